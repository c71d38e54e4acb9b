"""Boolean matrices of billions of rows, as trees of blocks in which equal blocks are stored once.

The matrices of a pattern repeat themselves: the same few blocks fill all segments. So a matrix of ``2^30 × 2^30``
entries takes some thousand blocks. Union, product and count visit each distinct block, or pair of blocks, once.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from longnet_dist.errors import ConfigError

Dense = npt.NDArray[np.bool_]
ZERO = 0
"""The block without an entry, on every level."""
MAX_PRODUCTS = 20_000_000


class Rectangle(NamedTuple):
    """Rows ``[top, top + height)`` and columns ``[left, left + width)`` of a matrix."""

    top: int
    left: int
    height: int
    width: int


class BlockMatrices:
    """Hold Boolean matrices of one size; a matrix is the number of its root block.

    A block of level 0 is dense, of ``leaf × leaf`` entries. A block of level ``l`` has ``f × f`` blocks of level
    ``l - 1``, with ``f = factors[l - 1]``.

    Args:
        leaf: rows of a block of level 0.
        factors: blocks in a row of blocks, of each level above.

    Attributes:
        sizes: rows of a block of each level.
        top: level of the matrices.
    """

    def __init__(self, leaf: int, factors: Sequence[int]) -> None:
        self.factors, self.top = tuple(factors), len(factors)
        self.sizes = [leaf]
        for factor in factors:
            self.sizes.append(self.sizes[-1] * factor)
        self._dense: list[Dense] = [np.zeros((leaf, leaf), bool)]
        self._parts: list[list[tuple[int, ...]]] = [[()] for _ in self.sizes]
        self._numbers: list[dict[Any, int]] = [{} for _ in self.sizes]
        self._unions: list[dict[tuple[int, int], int]] = [{} for _ in self.sizes]
        self._products: list[dict[tuple[int, int], int]] = [{} for _ in self.sizes]
        self._counts: list[dict[int, int]] = [{ZERO: 0} for _ in self.sizes]
        self._num_products = 0

    @property
    def num_blocks(self) -> int:
        """Return the number of distinct blocks."""
        return sum(map(len, self._numbers))

    def leaf(self, entries: Dense) -> int:
        """Return the block of level 0 with these entries."""
        if not entries.any():
            return ZERO
        key, numbers = np.packbits(entries).tobytes(), self._numbers[0]
        if key not in numbers:
            numbers[key] = len(self._dense)
            self._dense.append(entries)
        return numbers[key]

    def join(self, level: int, parts: tuple[int, ...]) -> int:
        """Return the block of ``level`` that consists of blocks of the level below, row by row."""
        if not any(parts):
            return ZERO
        numbers = self._numbers[level]
        if parts not in numbers:
            numbers[parts] = len(self._parts[level])
            self._parts[level].append(parts)
        return numbers[parts]

    def build(self, key: Callable[[int, int, int], Any], entries: Callable[[int, int], Dense]) -> int:
        """Return the matrix whose blocks are described by keys.

        Args:
            key: of a block, from its first row, its first column and its size: blocks of one size with equal keys must
                have equal entries. None for a block without entries.
            entries: of a block of level 0 at a first row and column, ``(leaf, leaf)``.
        """
        known: list[dict[Any, int]] = [{} for _ in self.sizes]

        def block(level: int, top: int, left: int) -> int:
            found = key(top, left, self.sizes[level])
            if found is None:
                return ZERO
            if found not in known[level]:
                if level == 0:
                    known[level][found] = self.leaf(entries(top, left))
                else:
                    parts = self._opened(level, ZERO, top, left)
                    known[level][found] = self.join(level, tuple(block(level - 1, x, y) for _, x, y in parts))
            return known[level][found]

        return block(self.top, 0, 0)

    def union(self, level: int, a: int, b: int) -> int:
        """Return ``a ∨ b``, entry by entry."""
        if a == b or ZERO in (a, b):
            return a or b
        key, known = (min(a, b), max(a, b)), self._unions[level]
        if key not in known:
            if level == 0:
                known[key] = self.leaf(self._dense[a] | self._dense[b])
            else:
                pairs = zip(self._parts[level][a], self._parts[level][b], strict=True)
                known[key] = self.join(level, tuple(self.union(level - 1, x, y) for x, y in pairs))
        return known[key]

    def product(self, level: int, a: int, b: int) -> int:
        """Return ``a · b``: entry ``(n, m)`` says whether some ``k`` has ``a(n, k)`` and ``b(k, m)``.

        Raises:
            ConfigError: the matrices have too many distinct blocks.
        """
        if ZERO in (a, b):
            return ZERO
        key, known = (a, b), self._products[level]
        if key not in known:
            self._num_products += 1
            if self._num_products > MAX_PRODUCTS:
                raise ConfigError(
                    f"the grids of this pattern repeat too rarely for an exact count over {self.sizes[-1]:,} rows: "
                    f"{self.num_blocks:,} blocks differ; use fewer rows, or segment lengths and dilation rates that "
                    f"are multiples of each other"
                )
            known[key] = self._multiply(level, a, b)
        return known[key]

    def _multiply(self, level: int, a: int, b: int) -> int:
        if level == 0:
            # Sums of up to `leaf` ones are exact in float32.
            return self.leaf(self._dense[a].astype(np.float32) @ self._dense[b].astype(np.float32) > 0)
        parts, below, size = [], level - 1, self.factors[level - 1]
        x, y = self._parts[level][a], self._parts[level][b]
        for row in range(size):
            for column in range(size):
                part = ZERO
                for k in range(size):
                    term = self.product(below, x[row * size + k], y[k * size + column])
                    part = self.union(below, part, term)
                parts.append(part)
        return self.join(level, tuple(parts))

    def count(self, level: int, block: int) -> int:
        """Return the number of entries that are true."""
        known = self._counts[level]
        if block not in known:
            parts = self._parts[level][block] if level else ()
            inner = sum(self.count(level - 1, part) for part in parts)
            known[block] = inner if level else int(self._dense[block].sum())
        return known[block]

    def first_difference(self, more: int, less: int) -> tuple[int, int]:
        """Return an entry ``(n, m)`` of matrix ``more`` that ``less`` has not; ``more`` must have all of ``less``."""
        row = column = 0
        for level in range(self.top, 0, -1):
            size, below = self.factors[level - 1], self.sizes[level - 1]
            left = self._parts[level][less] or (ZERO,) * size * size
            pairs = enumerate(zip(self._parts[level][more], left, strict=True))
            place, (more, less) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
            row, column = row + place // size * below, column + place % size * below
        n, m = np.argwhere(self._dense[more] & ~self._dense[less])[0].tolist()
        return row + n, column + m

    def empty_rectangles(self, matrix: int, lower: bool) -> Iterator[Rectangle]:
        """Yield rectangles without a true entry, larger ones first.

        Args:
            matrix: whose entries are asked.
            lower: only entries below the diagonal, columns before rows.
        """
        known: dict[tuple[int, int, bool], int] = {}
        heap = [(-self._largest_empty(self.top, matrix, lower, known), 0, 0, self.top, matrix)]
        while heap:
            found, top, left, level, block = heapq.heappop(heap)
            size, on_diagonal = self.sizes[level], lower and top == left
            if -found == level and not on_diagonal and block == ZERO:
                yield Rectangle(top, left, size, size)
            elif level == 0:
                for row, column in np.argwhere(_empty(self._dense[block], on_diagonal)).tolist():
                    yield Rectangle(top + row, left + column, 1, 1)
            else:
                for part, x, y in self._opened(level, block, top, left):
                    if lower and y > x:
                        continue
                    largest = self._largest_empty(level - 1, part, lower and x == y, known)
                    if largest >= 0:
                        heapq.heappush(heap, (-largest, x, y, level - 1, part))

    def _largest_empty(self, level: int, block: int, on_diagonal: bool, known: dict[tuple[int, int, bool], int]) -> int:
        """Return the level of the largest empty block inside of a block; -1 if all entries are true."""
        key = level, block, on_diagonal
        if block == ZERO and not on_diagonal:
            return level
        if key not in known:
            if level == 0:
                known[key] = 0 if _empty(self._dense[block], on_diagonal).any() else -1
            else:
                parts = self._opened(level, block, 0, 0)
                below = (part for part in parts if not on_diagonal or part[2] <= part[1])
                known[key] = max(self._largest_empty(level - 1, b, on_diagonal and x == y, known) for b, x, y in below)
        return known[key]

    def _opened(self, level: int, block: int, top: int, left: int) -> list[tuple[int, int, int]]:
        """Return the parts of a block at ``(top, left)``, each with its own place."""
        size, below = self.factors[level - 1], self.sizes[level - 1]
        parts = self._parts[level][block] or (ZERO,) * size * size
        return [(part, top + k // size * below, left + k % size * below) for k, part in enumerate(parts)]


def _empty(entries: Dense, on_diagonal: bool) -> Dense:
    return np.tril(~entries, -1) if on_diagonal else ~entries
