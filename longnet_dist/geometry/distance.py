"""How many blocks information needs from one row to another: the paper's claim of O(log N), by geometry alone.

In one block a row receives what the rows hold that it attends to, over all branches and heads, and keeps its own (the
residual path). So a block is a Boolean matrix ``A``: ``A(n, m)`` says that row ``n`` sees row ``m``. After ``L`` blocks
row ``n`` holds information of row ``m`` where the product of ``L`` such matrices has ``(n, m)``.

The matrices are products of grids and repeat themselves. So they are kept as trees of distinct blocks
(:mod:`~longnet_dist.geometry.block_matrix`), and the count is exact for billions of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np

from longnet_dist.errors import ConfigError
from longnet_dist.geometry.block_matrix import BlockMatrices, Dense, Rectangle
from longnet_dist.geometry.pattern import Branch, DilatedPattern

LARGEST_LEAF = 64
LARGEST_FACTOR = 16
NAMED = 4


@dataclass(frozen=True)
class Distances:
    """Say how many blocks information needs between the rows of a sequence.

    A pair is an ordered pair of different rows ``(n, m)``: information goes from ``m`` to ``n``, in a causal model with
    ``m < n``.

    Attributes:
        rows: ``N``.
        causal: whether a row sees only itself and earlier rows.
        pairs: number of all pairs.
        connected: number of pairs that some number of blocks connects.
        within: ``within[L]`` pairs need at most ``L`` blocks, for ``L = 0, 1, …`` up to the worst, or to the limit.
        last_pair: a pair ``(n, m)`` that needs as many blocks as ``within`` counts; None if no rows are connected.
        unconnected: rectangles of rows ``n`` and ``m`` that no number of blocks connects, the largest ones.
    """

    rows: int
    causal: bool
    pairs: int
    connected: int
    within: tuple[int, ...]
    last_pair: tuple[int, int] | None
    unconnected: tuple[Rectangle, ...]

    @property
    def never(self) -> int:
        """Return the number of pairs that no number of blocks connects."""
        return self.pairs - self.connected

    @property
    def worst(self) -> int | None:
        """Return the most blocks that a connected pair needs; None if that is beyond the limit."""
        return len(self.within) - 1 if self.within[-1] == self.connected else None

    @property
    def mean(self) -> float | None:
        """Return the mean number of blocks over the connected pairs; None if some need more than the limit."""
        if self.worst is None:
            return None
        late = sum(self.connected - within for within in self.within[:-1])
        return late / self.connected if self.connected else 0.0

    def named(self) -> str:
        """Name rows that are never connected; an empty string if there are none."""
        parts = []
        for top, left, height, width in self.unconnected:
            rows, columns = (f"{x:,}" if n == 1 else f"{x:,}–{x + n - 1:,}" for x, n in ((top, height), (left, width)))
            parts.append(f"row{'s' * (height > 1)} {rows} never see{'s' * (height == 1)} {columns}")
        return "; ".join(parts)


def block_distances(
    pattern: DilatedPattern | Sequence[DilatedPattern], N: int, heads: int, causal: bool = True, limit: int = 64
) -> Distances:
    """Count the blocks that information needs between any two rows, exactly.

    Args:
        pattern: of all blocks; or one for each block, the first block's first. If more blocks are needed than are
            given, they repeat.
        N: rows of the sequence, 1 or more.
        heads: key/value heads, whose offsets decide which rows a branch keeps. Query heads of one group keep the same.
        causal: whether a row sees only itself and earlier rows.
        limit: the largest number of blocks to count. Whether rows are connected at all does not depend on it.

    Raises:
        ConfigError: no pattern, rows, heads or blocks; or grids that repeat too rarely for ``N`` rows.
    """
    patterns = (pattern,) if isinstance(pattern, DilatedPattern) else tuple(pattern)
    if not patterns or min(N, heads, limit) < 1:
        raise ConfigError(
            f"distances need a pattern, rows, heads and a limit, but there are {len(patterns)} patterns, {N} rows, "
            f"{heads} heads and a limit of {limit} blocks; give at least one of each"
        )
    matrices = BlockMatrices(*_cuts(patterns, N))
    sights = [_Attention(matrices, each, N, heads, causal) for each in patterns]
    blocks = [matrices.build(sight.key, sight.entries) for sight in sights]
    history, unchanged = [_diagonal(matrices, N)], 0
    while unchanged < len(blocks) and len(history) <= limit + unchanged:
        block = blocks[(len(history) - 1) % len(blocks)]
        history.append(matrices.product(matrices.top, block, history[-1]))
        unchanged = unchanged + 1 if history[-1] == history[-2] else 0
    closure = history[-1] if unchanged == len(blocks) else _closure(matrices, blocks)
    history = history[: len(history) - unchanged]
    pairs = N * (N - 1) // 2 if causal else N * (N - 1)
    connected, *within = (matrices.count(matrices.top, matrix) - N for matrix in (closure, *history))
    last = matrices.first_difference(history[-1], history[-2]) if within[-1] > within[-2:][0] else None
    empty = matrices.empty_rectangles(matrices.union(matrices.top, closure, _outside(matrices, N)), lower=causal)
    return Distances(N, causal, pairs, connected, tuple(within), last, tuple(islice(empty, NAMED)))


def _closure(matrices: BlockMatrices, blocks: Sequence[int]) -> int:
    """Return which pairs any number of blocks connects: powers of all blocks' product, squared until nothing is new."""
    result = blocks[0]
    for block in blocks[1:]:
        result = matrices.product(matrices.top, block, result)
    while (square := matrices.product(matrices.top, result, result)) != result:
        result = square
    return result


def _cuts(patterns: Sequence[DilatedPattern], N: int) -> tuple[int, list[int]]:
    """Return the rows of a leaf and the factors of the levels above.

    Blocks repeat best where segments of every branch are whole blocks, so the factors are those of the lengths.
    """
    lengths = sorted({branch.segment_length for pattern in patterns for branch in pattern})
    factors, leaf = _factors(lengths[0]), 1
    if factors is None:
        factors, lengths = [2] * 5, lengths[:1]
    while factors and leaf * factors[0] <= LARGEST_LEAF:
        leaf *= factors.pop(0)
    for shorter, longer in pairwise(lengths):
        ratio, rest = divmod(longer, shorter)
        if rest or (more := _factors(ratio)) is None:
            break
        factors += more
    size, used = leaf, 0
    while size < N:
        if used == len(factors):
            factors.append(2)
        size, used = size * factors[used], used + 1
    return leaf, factors[:used]


def _factors(number: int) -> list[int] | None:
    """Return the prime factors of a number, ascending; None if one is larger than a row of blocks should be."""
    found = []
    for divisor in range(2, LARGEST_FACTOR + 1):
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
    return found if number == 1 else None


def _diagonal(matrices: BlockMatrices, N: int) -> int:
    """Return the matrix in which each of ``N`` rows has itself."""
    size = matrices.sizes[0]
    return matrices.build(
        lambda top, left, size: min(size, N - top) if top == left and top < N else None,
        lambda top, left: np.diag(np.arange(top, top + size) < N),
    )


def _outside(matrices: BlockMatrices, N: int) -> int:
    """Return the matrix of all entries beyond ``N`` rows and columns."""

    def entries(top: int, left: int) -> Dense:
        rows, columns = (np.arange(start, start + matrices.sizes[0]) >= N for start in (top, left))
        found: Dense = rows[:, None] | columns[None]
        return found

    def key(top: int, left: int, size: int) -> tuple[int, int] | None:
        inside = tuple(min(size, max(0, N - start)) for start in (top, left))
        return None if inside == (size, size) else (inside[0], inside[1])

    return matrices.build(key, entries)


class _Grid:
    """One branch: its segments, and the residues of the rows that it keeps in them."""

    def __init__(self, branch: Branch, offsets: Sequence[int]) -> None:
        self.length, self.rate, self.shift = branch.segment_length, branch.dilation_rate, branch.shift
        self.kept = sorted(set(offsets))

    def start(self, row: Any) -> Any:
        """Return the first row of the segment of ``row``; the first segment may be shorter, and begins at 0."""
        return np.maximum(0, (row - self.shift) // self.length * self.length + self.shift)

    def key(self, top: int, left: int, size: int) -> Any:
        """Return what the branch's entries in a block depend on; None if it has none there."""
        first, last = max(top, left), min(top, left) + size - 1
        # The ranges of rows share a segment only if one begins where the other has not passed its segment's end.
        if self._number(first) > self._number(last):
            return None
        edges = {self._number(x) for x in (top, left, top + size - 1, left + size - 1)}
        start = int(self.start(min(top, left)))
        if len(edges) > 1:
            return top - start, left - start, start == 0 and self.shift > 0
        x, y = (top - start) % self.rate, (left - start) % self.rate
        distances = (((kept - x) % self.rate, (kept - y) % self.rate) for kept in self.kept)
        hits = frozenset(pair for pair in distances if max(pair) < size)
        return (self.rate, hits) if hits else None

    def _number(self, row: int) -> int:
        return (row - self.shift) // self.length

    def entries(self, rows: Any, columns: Any) -> Dense:
        """Return which of ``rows (n, 1)`` and ``columns (1, m)`` keep each other, ``(n, m)``."""
        row_start, column_start = self.start(rows), self.start(columns)
        residue, other = (rows - row_start) % self.rate, (columns - column_start) % self.rate
        found: Dense = (row_start == column_start) & (residue == other) & np.isin(residue, self.kept)
        return found


class _Attention:
    """The matrix of one block: which rows see which, over all branches and heads, and each itself."""

    def __init__(self, matrices: BlockMatrices, pattern: DilatedPattern, N: int, heads: int, causal: bool) -> None:
        self.leaf, self.N, self.causal = matrices.sizes[0], N, causal
        self.grids = [_Grid(branch, pattern.offsets(branch, heads)) for branch in pattern]

    def key(self, top: int, left: int, size: int) -> Any:
        """Return what the entries of a block depend on; None if it has none."""
        if max(top, left) >= self.N or (self.causal and left >= top + size):
            return None
        keys = tuple(grid.key(top, left, size) for grid in self.grids)
        # Further from the diagonal than the block is large, neither the mask nor the row itself counts.
        apart = max(-size, min(size, top - left))
        if apart and not any(keys):
            return None
        return keys, apart, min(size, self.N - top), min(size, self.N - left)

    def entries(self, top: int, left: int) -> Dense:
        """Return the entries of a block of ``leaf × leaf``."""
        rows, columns = np.arange(top, top + self.leaf)[:, None], np.arange(left, left + self.leaf)[None]
        found: Dense = rows == columns
        for grid in self.grids:
            found |= grid.entries(rows, columns)
        if self.causal:
            found &= columns <= rows
        return found & (rows < self.N) & (columns < self.N)
