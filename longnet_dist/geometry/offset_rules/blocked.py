"""The offsets of torchscale's checkpoints."""

from __future__ import annotations

from longnet_dist.geometry.offset_rules import OFFSET_RULES, OffsetRule


@OFFSET_RULES.register("blocked")
class Blocked(OffsetRule):
    """Give head ``h`` of ``H`` the offset ``h // ceil(H / r)``: neighbours share one."""

    @staticmethod
    def offsets(rate: int, heads: int) -> tuple[int, ...]:
        """Return ``h // ceil(H / r)`` for each head ``h``."""
        block = -(-heads // rate)
        return tuple(head // block for head in range(heads))

    @staticmethod
    def head_block(rate: int, heads: int) -> int:
        """Return ``ceil(H / r)``."""
        return -(-heads // rate)
