"""Rules that give every key/value head its offset in a branch (``model.head_offsets``), each in a file of its own.

A rule registers an object with the attributes of :class:`OffsetRule` under its name::

    @OFFSET_RULES.register("reversed")
    class Reversed(OffsetRule):
        @staticmethod
        def offsets(rate, heads):
            return tuple(rate - 1 - head % rate for head in range(heads))

Nothing else must know of it: the reference, every kernel, the exchange and the planner ask the rule.
"""

from __future__ import annotations

from longnet_dist.registry import Registry


class OffsetRule:
    """Give heads their offsets, and say what kernels may take for granted of these.

    Attributes:
        merges_overlaps: whether head ``h`` has offset ``h mod r``, which ``geometry/overlap.py`` and the kernels rely
            on where they compute pairs that several branches share once.
    """

    merges_overlaps: bool = False

    @staticmethod
    def offsets(rate: int, heads: int) -> tuple[int, ...]:
        """Return the offset of each of ``heads`` key/value heads in a branch of dilation rate ``r``, in ``[0, r)``."""
        raise NotImplementedError

    @staticmethod
    def head_block(rate: int, heads: int) -> int | None:
        """Return the ``b`` with which head ``h`` has offset ``(h // b) mod r``; None where there is none.

        GPU kernels compute offsets with it. Without it they take a table of the offsets, and the kernels for Hopper
        leave the call to the portable ones.
        """
        return None


OFFSET_RULES: Registry[type[OffsetRule]] = Registry("head_offsets", __name__)
