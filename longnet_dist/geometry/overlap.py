"""Several branches can have the same (query, key) pair; this module finds such pairs, so that each is computed once.

Take a branch ``p`` and a branch ``c`` with ``w_c = 2·w_p`` and ``r_c`` a multiple of ``r_p``. Each half of a segment of
``c`` is a segment of ``p``, and the rows that ``c`` keeps in it are among those that ``p`` keeps. So the pairs of ``c``
within a half are pairs of ``p`` too.

The mixture of the branches is one softmax over the multiset union of their keys (paper, equations 9 and 10). In it, a
pair that ``m`` branches have counts ``m`` times. So it is enough that ``p`` computes the pair once and multiplies its
weight by ``m``. Branch ``c`` then computes only the pairs of a query in one half and a key in the other. In a causal
model these are queries of the second half and keys of the first, a block without a mask.

On shifted grids this holds where parents' segments begin in the middle of every whole segment of ``c``. The first
segment of a document is the end of a whole one: it splits in the middle of that one, or not at all.

The argument repeats: branches form chains, each with twice the segment length of the one before it. The first branch of
a chain is its *root*.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from longnet_dist.caches import bounded_cache
from longnet_dist.geometry.pattern import Branch, DilatedPattern, kept_rows
from longnet_dist.geometry.window import Piece

PERIOD = 64
"""Kept rows of the root after which the multiplicities of a chain must repeat: the rows of a kernel's tile."""
MAX_OVERLAPS = 8
"""Longest chain behind its root: kernels add 16 columns to queries and keys for ``log2 m``, two for each branch."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """An Overlap says which pairs a branch does not compute itself, and which it computes for other branches.

    Attributes:
        half: rows of the first half of a whole segment, if another branch computes the pairs within each half; else 0.
        overlap_rates: for each branch whose pairs this one computes, its dilation rate divided by this branch's,
            ascending.
    """

    half: int = 0
    overlap_rates: tuple[int, ...] = ()

    def split(self, piece: Piece, causal: bool) -> tuple[Piece, ...]:
        """Return the pieces that compute a piece of the branch, with overlaps merged.

        It is one piece, or two if the branch has a ``half`` and the model is not causal: the queries behind the first
        half with the keys in it, then the reverse.
        """
        halves = (self.half,) if causal or not self.half else (self.half, -self.half)
        return tuple(replace(piece, half=half, overlap_rates=self.overlap_rates) for half in halves)


@bounded_cache(maxsize=128)
def overlaps(pattern: DilatedPattern) -> tuple[Overlap, ...]:
    """Return the overlap of each branch of a pattern, in the order of the branches."""
    branches = pattern.branches
    # With offsets h mod r, r_p | r_c implies offset_c(h) ≡ offset_p(h) (mod r_p), so the rows of c are rows of p. Other
    # rules do not have this property, or not in the form in which kernels compute it.
    if not pattern.offset_rule.merges_overlaps:
        return (Overlap(),) * len(branches)
    next_of: dict[int, int] = {}
    root_of = dict(enumerate(range(len(branches))))
    depth_of = dict.fromkeys(root_of, 0)
    # By ascending length, so that the root of a parent is known before its child is placed.
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
    """Return ``Overlap.half`` of each branch, which limits what a causal model exchanges.

    Of a segment with a half, other ranks need only the keys of the first half, and only for queries of the second.
    """
    return tuple(overlap.half for overlap in overlaps(pattern))


def computed_share(pattern: DilatedPattern, N: int, kv_heads: int, causal: bool) -> float:
    """Return the share of a pattern's (query, key) pairs that is computed where overlaps are merged.

    Args:
        pattern: the branches.
        N: rows of the sequence.
        kv_heads: key/value heads.
        causal: whether a row sees only itself and earlier rows.
    """
    if len(pattern) == 1:
        return 1.0
    computed = 0
    for branch, overlap in zip(pattern, overlaps(pattern), strict=True):
        rate, half = branch.dilation_rate, overlap.half
        for offset in pattern.offsets(branch, kv_heads):
            for length, count, lead in branch.lengths(N):
                kept, keys = kept_rows(length, offset, rate), kept_rows(min(length, half - lead), offset, rate)
                pairs = kept * (kept + 1) // 2 if causal else kept * kept
                if half:
                    pairs = (kept - keys) * keys * (1 if causal else 2)
                computed += count * pairs
    return 4 * computed / pattern.flops(N, kv_heads, 1, causal)


def _covers(parent: Branch, child: Branch, root: Branch) -> bool:
    """Say whether the parent can compute all pairs within the halves of the child's segments.

    Four things are needed: halves of the child's segments are the parent's segments; the child's dilation rate is a
    power of two times the parent's; the child keeps the same rows in all segments of the root; and so it does in the
    first segment of a document.
    """
    # A power of two up to PERIOD times the root's rate divides PERIOD, so the pattern of multiplicities along the kept
    # rows of the root is the same in every tile. It is the same in every segment since r_child divides w_root.
    ratio, rest = divmod(child.dilation_rate, parent.dilation_rate)
    repeats = rest == 0 and ratio.bit_count() == 1 and child.dilation_rate <= PERIOD * root.dilation_rate
    aligned = child.segment_length == 2 * parent.segment_length and root.segment_length % child.dilation_rate == 0
    nested = (child.shift - parent.shift) % parent.segment_length == 0
    # The child's first segment counts its rows from 0. A segment of the root that begins in it, at a row ≡ s_root
    # (mod w_root), holds the same of these rows as others do only if r_child divides s_root.
    counted = child.shift == root.shift or root.shift % child.dilation_rate == 0
    return repeats and aligned and nested and counted
