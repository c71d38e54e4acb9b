"""The dilated pattern: which rows attend to which (LongNet, arXiv 2307.02486, section 2.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from longnet_dist.errors import ConfigError
from longnet_dist.geometry.documents import read_edges
from longnet_dist.geometry.offset_rules import OFFSET_RULES, OffsetRule


@dataclass(frozen=True, slots=True)
class Branch:
    """One pair (segment length ``w``, dilation rate ``r``), both in rows."""

    segment_length: int
    dilation_rate: int


@dataclass(frozen=True, init=False)
class DilatedPattern:
    r"""The branches of dilated attention; immutable and hashable.

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

    Raises:
        ConfigError: lengths or rates that are empty, of unequal number, or not positive integers; unknown offsets.
    """

    branches: tuple[Branch, ...]
    head_offsets: str

    def __init__(
        self, segment_lengths: Sequence[int], dilation_rates: Sequence[int], head_offsets: str = "modulo"
    ) -> None:
        lengths = _positive_integers("segment_lengths", segment_lengths)
        rates = _positive_integers("dilation_rates", dilation_rates)
        if len(lengths) != len(rates):
            raise ConfigError(
                f"every branch needs one segment length and one dilation rate, but there are {len(lengths)} "
                f"segment_lengths {list(lengths)} and {len(rates)} dilation_rates {list(rates)}; give as many of each"
            )
        OFFSET_RULES.check(head_offsets)
        object.__setattr__(self, "branches", tuple(map(Branch, lengths, rates)))
        object.__setattr__(self, "head_offsets", head_offsets)

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
        """The paper's language-model setting (section 4.1): w = 2048 … 32768, r = 1, 2, 4, 6, 12."""
        return cls([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12])

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        """``w`` of each branch, rows."""
        return tuple(branch.segment_length for branch in self.branches)

    @property
    def dilation_rates(self) -> tuple[int, ...]:
        """``r`` of each branch."""
        return tuple(branch.dilation_rate for branch in self.branches)

    def __iter__(self) -> Iterator[Branch]:
        return iter(self.branches)

    def __len__(self) -> int:
        return len(self.branches)

    def __repr__(self) -> str:
        return (
            f"DilatedPattern(segment_lengths={list(self.segment_lengths)}, "
            f"dilation_rates={list(self.dilation_rates)}, head_offsets={self.head_offsets!r})"
        )

    @property
    def offset_rule(self) -> type[OffsetRule]:
        """The rule that gives heads their offsets."""
        return OFFSET_RULES[self.head_offsets]

    def offsets(self, branch: Branch, heads: int) -> tuple[int, ...]:
        """Return the offset of each of ``heads`` key/value heads in the branch, each in ``[0, r)``.

        Raises:
            ConfigError: the rule gives other numbers.
        """
        return _offsets(self.head_offsets, branch.dilation_rate, heads)

    def head_block(self, branch: Branch, heads: int) -> int | None:
        """Return the ``b`` with which head ``h`` has offset ``(h // b) mod r`` in the branch; None without one.

        Raises:
            ConfigError: the rule has a ``b`` that does not give its offsets.
        """
        return _head_block(self.head_offsets, branch.dilation_rate, heads)

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
            lengths = Counter(stop - start for start, stop in pairwise(edges))
            of_length = (
                (count, self.flops(rows, heads, head_dim, causal, kv_heads)) for rows, count in lengths.items()
            )
            return sum(count * flops for count, flops in of_length)
        pairs = 0
        for branch in self.branches:
            width, rate = branch.segment_length, branch.dilation_rate
            for offset in self.offsets(branch, kv_heads):
                for length, count in ((width, N // width), (N % width, 1)):
                    kept = kept_rows(length, offset, rate)
                    pairs += count * (kept * (kept + 1) // 2 if causal else kept * kept)
        return 4 * head_dim * pairs * (heads // kv_heads)


def kept_rows(length: int, offset: int, rate: int) -> int:
    """How many of the positions ``0 … length-1`` are ``offset`` plus a multiple of ``rate``."""
    return max(0, -(-(length - offset) // rate))


@lru_cache(maxsize=256)
def _offsets(rule: str, rate: int, heads: int) -> tuple[int, ...]:
    offsets = OFFSET_RULES[rule].offsets(rate, heads)
    if len(offsets) != heads or not all(0 <= offset < rate for offset in offsets):
        raise ConfigError(
            f"an offset rule must give every head an offset of at least 0 and below the dilation rate, but {rule!r} "
            f"gives {list(offsets)} for {heads} heads and rate {rate}; correct the rule"
        )
    return offsets


@lru_cache(maxsize=256)
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


def check_heads(heads: int, kv_heads: int) -> None:
    """Raise ConfigError unless ``kv_heads`` divides ``heads``."""
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ConfigError(
            f"the number of query heads must be a multiple of the number of key/value heads, but heads={heads} and "
            f"kv_heads={kv_heads}; use a divisor of {heads}"
        )


def _positive_integers(name: str, values: Sequence[Any]) -> tuple[int, ...]:
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise ConfigError(f"{name} must be a list of positive integers, not {values!r}")
    result = []
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
            raise ConfigError(f"{name} must be positive integers, but {value!r} is in {list(values)}; use 1 or more")
        result.append(value.__index__())
    if not result:
        raise ConfigError(f"{name} is empty: a pattern needs at least one branch")
    return tuple(result)
