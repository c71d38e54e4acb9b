"""Patterns that are one segment of all rows with a mask: the baselines that dilated attention is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from longnet_dist.errors import ConfigError
from longnet_dist.geometry.pattern import DilatedPattern

ALL_ROWS = 2**40
"""A segment length that no sequence exceeds; times the numbers of a row it is still a 64-bit integer."""
STRIDE_UNIT = 128
SUMMARY_COLUMNS = 32
LEAST_TILE = 64
NONE, PART, WHOLE = 0, 1, 2
"""How many pairs of a block of queries and keys a mask leaves."""


class Tile(NamedTuple):
    """Query rows ``[start, stop)`` with all keys that they see.

    Attributes:
        start, stop: of the queries.
        keys: rows of the keys, ``(heads, K)``.
        mask: which of the keys a query sees, the same for all heads, ``(stop - start, K)``.
    """

    start: int
    stop: int
    keys: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]


@dataclass(frozen=True, init=False, repr=False)
class MaskedPattern(DilatedPattern):
    """One segment of all rows, in which a mask says which pairs attend.

    To positions, streams and plans it is full attention. ``attention/masked.py`` computes it.
    """

    def __init__(self) -> None:
        super().__init__([ALL_ROWS], [1])

    def sees(self, n: Any, m: Any, head: Any, N: int, causal: bool) -> Any:
        """Return whether query row ``n`` sees key row ``m`` in a key/value head, for integers or arrays of them."""
        raise NotImplementedError

    def tiles(self, N: int, heads: int, causal: bool) -> Iterator[Tile]:
        """Yield all query rows of a sequence, tile by tile."""
        raise NotImplementedError

    def blocks(self, N: int, heads: int, size: int, causal: bool) -> npt.NDArray[np.int8]:
        """Return NONE, PART or WHOLE for each block of ``size`` queries and keys, ``(heads, N/size, N/size)``.

        Args:
            N: rows; the last block may be shorter.
            heads: key/value heads.
            size: rows of a block.
            causal: whether a row sees only itself and earlier rows.
        """
        raise NotImplementedError


@dataclass(frozen=True, init=False, repr=False)
class FixedPattern(MaskedPattern):
    """The fixed pattern of the Sparse Transformer (arXiv 1904.10509), causal.

    The sequence is cut into blocks of ``l`` rows, ``l = 128·round(√N / 128)`` and at least 128. A row sees its own
    block up to itself, and in every earlier block ``c = 32`` columns: the last ones for head 0, those before them for
    head 1, and so on, again from the last ones after ``l / c`` heads.
    """

    def __repr__(self) -> str:
        return "FixedPattern()"

    @staticmethod
    def stride(N: int) -> int:
        """Return ``l``, the rows of a block in a sequence of ``N`` rows."""
        return STRIDE_UNIT * max(1, round(math.sqrt(N) / STRIDE_UNIT))

    def pairs(self, N: int, kv_heads: int, causal: bool) -> int:
        """Count the pairs of all key/value heads."""
        stride = self.stride(N)
        whole, rest = divmod(N, stride)
        own = whole * (stride * (stride + 1) // 2) + rest * (rest + 1) // 2
        earlier = SUMMARY_COLUMNS * (stride * (whole * (whole - 1) // 2) + rest * whole)
        return kv_heads * (own + earlier)

    def sees(self, n: Any, m: Any, head: Any, N: int, causal: bool) -> Any:
        """Return whether a row sees another: see the base class."""
        stride = self.stride(N)
        last = stride - SUMMARY_COLUMNS * (head % (stride // SUMMARY_COLUMNS))
        column, earlier = m % stride, n // stride > m // stride
        in_columns = (column < last) & (column >= last - SUMMARY_COLUMNS)
        return (m <= n) & ((n // stride == m // stride) | (earlier & in_columns))

    def tiles(self, N: int, heads: int, causal: bool) -> Iterator[Tile]:
        """Yield the blocks of ``l`` rows."""
        stride = self.stride(N)
        last = stride - SUMMARY_COLUMNS * (np.arange(heads) % (stride // SUMMARY_COLUMNS))
        columns = last[:, None] - SUMMARY_COLUMNS + np.arange(SUMMARY_COLUMNS)
        for start in range(0, N, stride):
            stop = min(start + stride, N)
            earlier = (np.arange(0, start, stride)[None, :, None] + columns[:, None]).reshape(heads, -1)
            own = np.broadcast_to(np.arange(start, stop), (heads, stop - start))
            keys = np.concatenate([earlier, own], 1)
            yield Tile(start, stop, keys, np.tri(stop - start, keys.shape[1], earlier.shape[1], dtype=bool))

    def blocks(self, N: int, heads: int, size: int, causal: bool) -> npt.NDArray[np.int8]:
        """Return what the mask leaves of each block; ``size`` must divide 128 and be a multiple of 32."""
        stride, number = self.stride(N), -(-N // size)
        block, place = np.divmod(np.arange(number) * size, stride)
        head = np.arange(heads) % (stride // SUMMARY_COLUMNS)
        with_columns = (stride - 1 - SUMMARY_COLUMNS * head) // size
        found = np.zeros((heads, number, number), np.int8)
        same = block[:, None] == block
        found |= (same & np.tri(number, number, -1, dtype=bool)).astype(np.int8) * WHOLE
        found |= np.eye(number, dtype=np.int8) * PART
        some = (block[:, None] > block) & (place // size == with_columns[:, None])[:, None]
        found |= some.astype(np.int8) * (WHOLE if size == SUMMARY_COLUMNS else PART)
        return found


@dataclass(frozen=True, init=False, repr=False)
class WindowPattern(MaskedPattern):
    """Sliding-window attention: a row sees the rows less than ``window`` away, itself included.

    Args:
        window: rows, at least 1. In a causal model a row sees itself and the ``window - 1`` rows before it.

    Raises:
        ConfigError: no window.
    """

    window: int

    def __init__(self, window: int) -> None:
        super().__init__()
        if window < 1:
            raise ConfigError(f"a window has at least one row, the query's own, not {window}; use 1 or more")
        object.__setattr__(self, "window", window)

    def __repr__(self) -> str:
        return f"WindowPattern({self.window})"

    def pairs(self, N: int, kv_heads: int, causal: bool) -> int:
        """Count the pairs of all key/value heads."""
        far = min(self.window, N) - 1
        before = far * (far + 1) // 2 + (N - far - 1) * far
        return kv_heads * (N + before * (1 if causal else 2))

    def sees(self, n: Any, m: Any, head: Any, N: int, causal: bool) -> Any:
        """Return whether a row sees another: see the base class."""
        before = (m <= n) & (n - m < self.window)
        return before if causal else before | ((m > n) & (m - n < self.window))

    def tiles(self, N: int, heads: int, causal: bool) -> Iterator[Tile]:
        """Yield tiles of a quarter of the window."""
        size, far = max(LEAST_TILE, self.window // 4), self.window - 1
        for start in range(0, N, size):
            stop = min(start + size, N)
            keys = np.arange(max(0, start - far), stop if causal else min(N, stop + far))
            mask = self.sees(np.arange(start, stop)[:, None], keys, 0, N, causal)
            yield Tile(start, stop, np.broadcast_to(keys, (heads, len(keys))), mask)

    def blocks(self, N: int, heads: int, size: int, causal: bool) -> npt.NDArray[np.int8]:
        """Return what the mask leaves of each block."""
        number = -(-N // size)
        apart = (np.arange(number)[:, None] - np.arange(number)) * size
        # A query is from `apart - size + 1` to `apart + size - 1` rows behind a key of the block.
        nearest, furthest = np.maximum(np.abs(apart) - size + 1, 0), np.abs(apart) + size - 1
        found = np.where(furthest < self.window, WHOLE, np.where(nearest < self.window, PART, NONE)).astype(np.int8)
        if causal:
            found[apart < 0] = NONE
            np.fill_diagonal(found, PART)
        return np.broadcast_to(found, (heads, number, number))
