"""Pairs of rows that several branches hold, so that each is computed once.

A branch ``c`` with ``w_c = 2·w_p`` and ``r_c`` a multiple of ``r_p`` keeps, in each half of its segments, some of the
rows that branch ``p`` keeps in the segment of the same place. Its pairs within a half are therefore pairs of ``p``,
too. In the softmax over the multiset union a pair that ``m`` branches hold counts ``m`` times, so ``p`` may compute it
once with its weight times ``m``, and ``c`` is left with the pairs of a query of one half and a key of the other: in a
causal model a query of the second and a key of the first, which no mask divides. Chains of such branches leave
pairs along the whole chain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from longnet_dist.geometry.pattern import Branch, DilatedPattern, kept_rows
from longnet_dist.geometry.window import Piece

PERIOD = 64
"""Rows after which the kept rows of a chain must repeat: of a kernel's tile."""
MAX_OVERLAPS = 8
"""Branches that may leave pairs to one: half the columns that a kernel adds to its rows."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a branch leaves to another, and what others leave to it.

    Attributes:
        half: rows of a segment's first half, where the pairs within a half are another branch's; 0 where none are.
        overlap_rates: for each branch that leaves pairs to this one, its dilation rate over this one's, ascending.
    """

    half: int = 0
    overlap_rates: tuple[int, ...] = ()

    def split(self, piece: Piece, causal: bool) -> tuple[Piece, ...]:
        """The piece of the branch without the pairs that it leaves, and with those that it computes for others."""
        halves = (self.half,) if causal or not self.half else (self.half, -self.half)
        return tuple(replace(piece, half=half, overlap_rates=self.overlap_rates) for half in halves)


@lru_cache(maxsize=128)
def overlaps(pattern: DilatedPattern) -> tuple[Overlap, ...]:
    """Of each branch; only offsets ``h mod r`` let one branch's rows lie in another's."""
    branches = pattern.branches
    if pattern.head_offsets != "modulo":
        return (Overlap(),) * len(branches)
    next_of: dict[int, int] = {}
    root_of = dict(enumerate(range(len(branches))))
    depth_of = dict.fromkeys(root_of, 0)
    for child, branch in sorted(enumerate(branches), key=lambda item: item[1].segment_length):
        for parent, other in enumerate(branches):
            root = branches[root_of[parent]]
            extensible = parent not in next_of and depth_of[parent] < MAX_OVERLAPS
            if extensible and _covers(other, branch, root):
                next_of[parent], root_of[child], depth_of[child] = child, root_of[parent], depth_of[parent] + 1
                break
    found = []
    for number, branch in enumerate(branches):
        half = branch.segment_length // 2 if number in next_of.values() else 0
        rates, later = [], next_of.get(number)
        while later is not None:
            rates.append(branches[later].dilation_rate // branch.dilation_rate)
            later = next_of.get(later)
        found.append(Overlap(half, tuple(rates)))
    return tuple(found)


def first_halves(pattern: DilatedPattern) -> tuple[int, ...]:
    """``Overlap.half`` of each branch: where its keys are needed, in a causal model, by the queries behind them."""
    return tuple(overlap.half for overlap in overlaps(pattern))


def computed_share(pattern: DilatedPattern, N: int, kv_heads: int, causal: bool) -> float:
    """Pairs that are computed where overlaps are merged, over all (query, key) pairs of the pattern.

    Args:
        pattern: the branches.
        N: rows of the sequence.
        kv_heads: key/value heads.
        causal: whether a row sees only itself and earlier rows.
    """
    computed = 0
    for branch, overlap in zip(pattern, overlaps(pattern), strict=True):
        width, rate, half = branch.segment_length, branch.dilation_rate, overlap.half
        for offset in pattern.offsets(branch, kv_heads):
            for length, count in ((width, N // width), (N % width, 1)):
                kept, keys = kept_rows(length, offset, rate), kept_rows(min(length, half), offset, rate)
                pairs = kept * (kept + 1) // 2 if causal else kept * kept
                if half:
                    pairs = (kept - keys) * keys * (1 if causal else 2)
                computed += count * pairs
    return 4 * computed / pattern.flops(N, kv_heads, 1, causal)


def _covers(parent: Branch, child: Branch, root: Branch) -> bool:
    """Whether the parent holds all pairs within a half of the child's segments.

    Kept rows must stand at the same places in all segments of the chain, and repeat within ``PERIOD`` rows of the root.
    """
    ratio, rest = divmod(child.dilation_rate, parent.dilation_rate)
    repeats = rest == 0 and ratio.bit_count() == 1 and child.dilation_rate <= PERIOD * root.dilation_rate
    aligned = child.segment_length == 2 * parent.segment_length and root.segment_length % child.dilation_rate == 0
    return repeats and aligned
