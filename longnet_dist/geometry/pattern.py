"""The dilated pattern: which rows attend to which (LongNet, arXiv 2307.02486, section 2.2)."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from longnet_dist.caches import bounded_cache
from longnet_dist.errors import ConfigError
from longnet_dist.geometry.documents import as_integer, read_edges
from longnet_dist.geometry.offset_rules import OFFSET_RULES, OffsetRule


@dataclass(frozen=True, slots=True)
class Branch:
    """One pair (segment length ``w``, dilation rate ``r``), both in rows.

    Attributes:
        shift: row ``s`` of a document at which the grid of segments begins, in ``[0, w)``. The first segment ``[0, s)``
            is shorter; it counts its rows from 0, like any other.
    """

    segment_length: int
    dilation_rate: int
    shift: int = 0

    def segment_of(self, position: int) -> tuple[int, int]:
        """Return the segment ``(start, stop)`` that contains a row of a long document, both counted from its start."""
        if position < self.shift:
            return 0, self.shift
        start = position - (position - self.shift) % self.segment_length
        return start, start + self.segment_length

    def lengths(self, rows: int) -> list[tuple[int, int, int]]:
        """Return the segments of a document of ``rows`` rows as ``(length, count, lead)``.

        The first segment lacks ``lead`` rows of a whole one at its start; others lack none there.
        """
        first = min(self.shift, rows)
        whole, rest = divmod(rows - first, self.segment_length)
        found = [(first, 1, self.segment_length - self.shift), (self.segment_length, whole, 0), (rest, 1, 0)]
        return [(length, count, lead) for length, count, lead in found if length and count]


@dataclass(frozen=True, init=False)
class DilatedPattern:
    r"""Hold the branches of dilated attention; immutable and hashable.

    A branch cuts the sequence into segments :math:`[s w, \min((s+1) w, N))`. In a segment, head ``h`` keeps the rows
    whose position is :math:`\mathrm{offset}(h) \bmod r`, and the kept rows attend to each other. The branches are
    mixed by their softmax denominators (paper, equations 9 and 10), which makes the mixture one softmax over the
    multiset union of all keys that a query sees.

    Args:
        segment_lengths: ``w`` of each branch, rows, positive.
        dilation_rates: ``r`` of each branch, positive, as many as segment lengths.
        head_offsets: name of a rule of ``geometry/offset_rules``. ``"modulo"``: offset ``h mod r`` (the paper);
            ``"blocked"``: ``h // ceil(H / r)`` (checkpoints of torchscale). With grouped-query attention ``h`` counts
            key/value heads.
        shift: for each branch, ``s`` in ``[0, w)``: its segments begin at rows ``s`` modulo ``w`` of a document. The
            first segment ``[0, s)`` is shorter. None: 0 for all.

    Attributes:
        turn: added to the offset of each head, modulo ``r`` (:meth:`of_layer`).
        first_head, total_heads: the key/value heads of a call are those from ``first_head`` on, of ``total_heads`` of
            the whole model (:meth:`of_heads`); None: of as many as the call has.

    Raises:
        ConfigError: lengths or rates that are empty, of unequal number, or not positive integers; unknown offsets; a
            shift outside ``[0, w)``.
    """

    branches: tuple[Branch, ...]
    head_offsets: str
    turn: int
    first_head: int
    total_heads: int | None

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        head_offsets: str = "modulo",
        shift: Sequence[int] | None = None,
    ) -> None:
        lengths = _positive_integers("segment_lengths", segment_lengths)
        rates = _positive_integers("dilation_rates", dilation_rates)
        if len(lengths) != len(rates):
            raise ConfigError(
                f"every branch needs one segment length and one dilation rate, but there are {len(lengths)} "
                f"segment_lengths {list(lengths)} and {len(rates)} dilation_rates {list(rates)}; give as many of each"
            )
        OFFSET_RULES.check(head_offsets)
        self._set(
            branches=tuple(map(Branch, lengths, rates, _shifts(shift, lengths))),
            head_offsets=head_offsets,
            turn=0,
            first_head=0,
            total_heads=None,
        )

    def __hash__(self) -> int:
        # Every call looks its plans up by its pattern.
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Integers alone hash alike in all processes, between which patterns travel.
        branches = ((x.segment_length, x.dilation_rate, x.shift) for x in self.branches)
        return hash((*branches, self.turn, self.first_head, self.total_heads or 0))

    def _set(self, **fields: Any) -> DilatedPattern:
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        return self

    def _changed(self, **fields: Any) -> DilatedPattern:
        changed = copy.copy(self)
        changed.__dict__.pop("_hash", None)  # that of this pattern
        return changed._set(**fields)

    @classmethod
    def geometric(cls, base: int = 2048, longest: int = 32768, ratio: int = 2) -> DilatedPattern:
        """Branches ``w = base·ratio^i, r = ratio^i`` up to the first ``w >= longest`` (paper, equation 8).

        ``w / r`` is constant, so every branch costs ``1/r`` of the first and the whole is linear in N.

        Args:
            base: shortest segment length, rows.
            longest: the sequence length to reach, rows.
            ratio: growth from one branch to the next, at least 2.
        """
        _positive_integers("base", [base])
        _positive_integers("longest", [longest])
        _positive_integers("ratio", [ratio])
        if ratio < 2:
            raise ConfigError(f"ratio must be at least 2, not {ratio}: the segments would not grow")
        rates = [1]
        while base * rates[-1] < longest:
            rates.append(rates[-1] * ratio)
        return cls([base * rate for rate in rates], rates)

    @classmethod
    def paper(cls) -> DilatedPattern:
        """Return the paper's language-model setting (section 4.1): w = 2048 … 32768, r = 1, 2, 4, 6, 12."""
        return cls([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12])

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        """``w`` of each branch, rows."""
        return tuple(branch.segment_length for branch in self.branches)

    @property
    def dilation_rates(self) -> tuple[int, ...]:
        """``r`` of each branch."""
        return tuple(branch.dilation_rate for branch in self.branches)

    @property
    def shift(self) -> tuple[int, ...]:
        """Row of a document at which the grid of each branch begins, modulo ``w``."""
        return tuple(branch.shift for branch in self.branches)

    @property
    def shifted(self) -> bool:
        """Say whether a branch has a shift."""
        return any(branch.shift for branch in self.branches)

    @property
    def common_start(self) -> int | None:
        """Return the first row at which the grids of all branches begin, modulo the least common multiple of all ``w``.

        It is None where there is no such row.
        """
        if not self.shifted:
            return 0
        start, period = 0, 1
        for branch in self.branches:
            step = math.gcd(period, branch.segment_length)
            if (branch.shift - start) % step:
                return None
            # start + t·period ≡ shift (mod w): a solution exists, as the gcd divides the difference.
            width = branch.segment_length // step
            start += period * ((branch.shift - start) // step * pow(period // step, -1, width) % width)
            period *= width
        return start

    def of_layer(self, layer: int, offsets: bool = False, shift: bool = False) -> DilatedPattern:
        """Return the pattern of a layer of a model, counted from 0.

        Args:
            layer: number of the layer.
            offsets: whether head ``h`` has the offset of the rule plus ``layer``, modulo ``r``.
            shift: whether in odd layers all grids begin at one common row: a third of the longest segment, rounded down
                to a multiple of every rate.
        """
        turn, branches = (layer if offsets else 0), self.branches
        if shift and layer % 2:
            step = math.lcm(*self.dilation_rates)
            row = max(self.segment_lengths) // 3 // step * step
            branches = tuple(replace(branch, shift=row % branch.segment_length) for branch in branches)
        return self._changed(branches=branches, turn=turn % math.lcm(*self.dilation_rates))

    def of_heads(self, first_head: int, total_heads: int | None, heads: int) -> DilatedPattern:
        """Return the pattern of a call that holds ``heads`` key/value heads from ``first_head`` on, of ``total_heads``.

        Args:
            first_head: of the whole model.
            total_heads: of the whole model; None: those up to the last of this call.
            heads: of this call.

        Raises:
            ConfigError: not integers, or heads that the model does not have.
        """
        first = as_integer(first_head)
        total = None if first is None else as_integer(first + heads if total_heads is None else total_heads)
        if first is None or total is None:
            name, value = ("first_head", first_head) if first is None else ("total_heads", total_heads)
            raise ConfigError(f"{name} must be an integer, not {value!r}; leave it out where k has all heads")
        if not 0 <= first <= first + heads <= total:
            raise ConfigError(
                f"first_head and total_heads count key/value heads of the whole model, but heads {first} … "
                f"{first + heads - 1} of this call are not all among {total}; first_head must be at least 0 and "
                f"total_heads at least first_head plus the {heads} heads of k"
            )
        return self if (first, total) == (0, heads) else self._changed(first_head=first, total_heads=total)

    @property
    def of_model(self) -> DilatedPattern:
        """Return the pattern of all heads of the model."""
        return self if self.total_heads is None else self._changed(first_head=0, total_heads=None)

    def __iter__(self) -> Iterator[Branch]:
        return iter(self.branches)

    def __len__(self) -> int:
        return len(self.branches)

    def __repr__(self) -> str:
        shift = f", shift={list(self.shift)}" if self.shifted else ""
        turn = f".of_layer({self.turn}, offsets=True)" if self.turn else ""
        return (
            f"DilatedPattern(segment_lengths={list(self.segment_lengths)}, "
            f"dilation_rates={list(self.dilation_rates)}, head_offsets={self.head_offsets!r}{shift}){turn}"
        )

    @property
    def offset_rule(self) -> type[OffsetRule]:
        """Return the rule that gives heads their offsets."""
        return OFFSET_RULES[self.head_offsets]

    def offsets(self, branch: Branch, heads: int) -> tuple[int, ...]:
        """Return the offset of each of ``heads`` key/value heads in the branch, each in ``[0, r)``.

        Raises:
            ConfigError: the rule gives other numbers.
        """
        first, rate = self.first_head, branch.dilation_rate
        offsets = _offsets(self.head_offsets, rate, self.total_heads or heads)[first : first + heads]
        return tuple((offset + self.turn) % rate for offset in offsets) if self.turn else offsets

    def head_block(self, branch: Branch, heads: int) -> int | None:
        """Return the ``b`` with which head ``h`` has offset ``((h + c) // b) mod r`` in the branch; None without one.

        ``c`` is :meth:`heads_before`.

        Raises:
            ConfigError: the rule has a ``b`` that does not give its offsets.
        """
        return _head_block(self.head_offsets, branch.dilation_rate, self.total_heads or heads)

    def heads_before(self, branch: Branch, heads: int) -> int:
        """Return the ``c`` of :meth:`head_block`, reduced as far as the offsets of all branches allow."""
        block = self.head_block(branch, heads)
        if block is None or not (self.turn or self.first_head):
            return 0
        return (self.first_head + block * self.turn) % (block * math.lcm(*self.dilation_rates))

    def flops(
        self, N: int, heads: int, head_dim: int, causal: bool, kv_heads: int | None = None, cu_seqlens: Any = None
    ) -> int:
        """FLOPs of one forward: ``4 · head_dim ·`` the number of attended (query, key) pairs, exact.

        Args:
            N: rows of the sequence.
            heads: query heads ``H``.
            head_dim: ``D``.
            causal: whether a row sees only itself and earlier rows.
            kv_heads: key/value heads, ``H`` if not given; must divide ``heads``.
            cu_seqlens: edges of packed documents, which are counted one by one; None: one document of ``N`` rows.
        """
        kv_heads = heads if kv_heads is None else kv_heads
        check_heads(heads, kv_heads)
        if cu_seqlens is not None:
            (edges,) = read_edges(cu_seqlens, 1, N)
            lengths = Counter(stop - start for start, stop in pairwise(edges.tolist()))
            of_length = (
                (count, self.flops(rows, heads, head_dim, causal, kv_heads)) for rows, count in lengths.items()
            )
            return sum(count * flops for count, flops in of_length)
        return 4 * head_dim * self.pairs(N, kv_heads, causal) * (heads // kv_heads)

    def pairs(self, N: int, kv_heads: int, causal: bool) -> int:
        """Count the attended (query, key) pairs of all branches and key/value heads in a sequence of ``N`` rows."""
        pairs = 0
        for branch in self.branches:
            for offset in self.offsets(branch, kv_heads):
                for length, count, _ in branch.lengths(N):
                    kept = kept_rows(length, offset, branch.dilation_rate)
                    pairs += count * (kept * (kept + 1) // 2 if causal else kept * kept)
        return pairs


def kept_rows(length: int, offset: int, rate: int) -> int:
    """Count the positions ``0 … length-1`` that are ``offset`` plus a multiple of ``rate``."""
    return max(0, -(-(length - offset) // rate))


@bounded_cache(maxsize=256)
def _offsets(rule: str, rate: int, heads: int) -> tuple[int, ...]:
    offsets = OFFSET_RULES[rule].offsets(rate, heads)
    if len(offsets) != heads or not all(0 <= offset < rate for offset in offsets):
        raise ConfigError(
            f"an offset rule must give every head an offset of at least 0 and below the dilation rate, but {rule!r} "
            f"gives {list(offsets)} for {heads} heads and rate {rate}; correct the rule"
        )
    return offsets


@bounded_cache(maxsize=256)
def _head_block(rule: str, rate: int, heads: int) -> int | None:
    found, offsets = OFFSET_RULES[rule], _offsets(rule, rate, heads)
    block = found.head_block(rate, heads)
    if found.merges_overlaps and block != 1:
        raise ConfigError(
            f"overlaps can be merged only where head h has offset h mod r, but the offset rule {rule!r} merges them "
            f"and its head_block is {block}; correct the rule"
        )
    if block is not None and offsets != tuple(head // block % rate for head in range(heads)):
        raise ConfigError(
            f"with head_block b an offset rule gives head h the offset (h // b) mod r, but {rule!r} has b={block} and "
            f"gives {list(offsets)} for {heads} heads and rate {rate}; correct the rule, or return None"
        )
    return block


def check_pattern(pattern: object) -> None:
    """Raise ConfigError unless ``pattern`` is a :class:`DilatedPattern`."""
    if not isinstance(pattern, DilatedPattern):
        raise ConfigError(
            f"the pattern must be a DilatedPattern, such as DilatedPattern([512, 4096], [1, 8]), but is {pattern!r}"
        )


def check_heads(heads: int, kv_heads: int) -> None:
    """Raise ConfigError unless both are integers and ``kv_heads`` divides ``heads``."""
    if None in (as_integer(heads), as_integer(kv_heads)):
        raise ConfigError(f"numbers of heads must be integers, but are heads={heads!r} and kv_heads={kv_heads!r}")
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ConfigError(
            f"the number of query heads must be a multiple of the number of key/value heads, but heads={heads} and "
            f"kv_heads={kv_heads}; use a divisor of {heads}"
        )


def _shifts(shift: Sequence[int] | None, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Check the shift of each branch."""
    if shift is None:
        return (0,) * len(lengths)
    values = _listed(shift)
    if values is None:
        raise ConfigError(f"shift must be a list with a row for each branch, not {shift!r}; give as many as branches")
    if len(values) != len(lengths):
        raise ConfigError(
            f"every branch needs one shift, but there are {len(lengths)} segment_lengths {list(lengths)} and "
            f"{len(values)} in shift {values}; give as many of each, or None"
        )
    found = []
    for value, width in zip(values, lengths, strict=True):
        number = as_integer(value)
        if number is None or not 0 <= number < width:
            raise ConfigError(
                f"a shift must be an integer of at least 0 and below the segment length, but {value!r} in shift "
                f"{values} is none for segment length {width}; take it modulo {width}"
            )
        found.append(number)
    return tuple(found)


MOST_ROWS = 2**40
"""Longest segment and largest rate: their products with strides of tensors fit into 64 bits."""


def _positive_integers(name: str, values: Sequence[Any]) -> tuple[int, ...]:
    listed = _listed(values)
    if listed is None:
        raise ConfigError(f"{name} must be a list of positive integers, not {values!r}; give one for each branch")
    result = []
    for value in listed:
        number = as_integer(value)
        if number is None or number < 1:
            raise ConfigError(f"{name} must be positive integers, but {value!r} is in {listed}; use 1 or more")
        if number > MOST_ROWS:
            raise ConfigError(
                f"{name} must be at most 2^40, but {value!r} is in {listed}; a segment as long as the sequence holds "
                f"all of it"
            )
        result.append(number)
    if not result:
        raise ConfigError(f"{name} is empty: a pattern needs at least one branch")
    return tuple(result)


def _listed(values: Any) -> list[Any] | None:
    """Return a sequence, array or tensor as a list; None for what has no items, and for text."""
    try:
        return None if isinstance(values, str | bytes) else list(values)
    except TypeError:
        return None
