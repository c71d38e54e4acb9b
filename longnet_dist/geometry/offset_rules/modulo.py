"""The paper's offsets (LongNet, section 2.3)."""

from __future__ import annotations

from longnet_dist.geometry.offset_rules import OFFSET_RULES, OffsetRule


@OFFSET_RULES.register("modulo")
class Modulo(OffsetRule):
    """Give head ``h`` the offset ``h mod r``."""

    merges_overlaps = True

    @staticmethod
    def offsets(rate: int, heads: int) -> tuple[int, ...]:
        """Return ``h mod r`` for each head ``h``."""
        return tuple(head % rate for head in range(heads))

    @staticmethod
    def head_block(rate: int, heads: int) -> int:
        """Return 1: neighbouring heads have neighbouring offsets."""
        return 1
