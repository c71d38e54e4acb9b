"""Strided views of a piece: the problems of a dense attention kernel, without copying a row.

All segments of equal length and all key/value heads of equal offset form one batch of attention problems whose rows are
``r`` apart in the sequence. A kernel that takes strides computes them where they stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longnet_dist.kernels.contract import Call


@dataclass(frozen=True, slots=True)
class View:
    """One batch of equal problems: ``segments`` segments, the kv heads ``heads``, ``queries`` rows against ``keys``.

    Attributes:
        first_query: index ``j`` of the first query; a causal query ``j`` sees keys ``i <= j``.
    """

    call: Call
    first_segment: int
    segments: int
    heads: slice
    offset: int
    queries: int
    keys: int
    first_query: int

    def query_rows(self, x: Tensor) -> Tensor:
        """The queries' rows of a ``(B, n, H, ...)`` buffer: a view ``(B, segments, queries, heads, H / Hkv, ...)``."""
        piece = self.call.piece
        row = piece.queries(self.first_segment, self.offset)[0]
        return self._rows(_grouped(x, len(self.call.offsets)), row, self.queries, piece.dilation_rate)

    def key_rows(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Keys ``start … stop-1`` of a ``(B, rows, Hkv, D)`` buffer: a view ``(B, segments, keys, heads, D)``."""
        row, _, step = self.call.piece.keys(self.first_segment, self.offset)
        stop = self.keys if stop is None else stop
        return self._rows(x, row + start * step, stop - start, step)

    def split(self, most_segments: int) -> Iterator[View]:
        """The same rows in views of at most ``most_segments`` segments."""
        for done in range(0, self.segments, most_segments):
            count = min(most_segments, self.segments - done)
            yield replace(self, first_segment=self.first_segment + done, segments=count)

    def _rows(self, x: Tensor, row: int, count: int, step: int) -> Tensor:
        x = x[:, :, self.heads]
        strides = list(x.stride())
        width = self.call.piece.segment_length
        return x.as_strided(
            (x.shape[0], self.segments, count, *x.shape[2:]),
            (strides[0], width * strides[1], step * strides[1], *strides[2:]),
            x.storage_offset() + row * strides[1],
        )


def views(call: Call) -> Iterator[View]:
    """The views of a piece, those without queries or keys left out."""
    for first_segment, segments in call.piece.runs():
        for offset in sorted(set(call.offsets)):
            _, queries, first_query = call.piece.queries(first_segment, offset)
            keys = call.piece.keys(first_segment, offset)[1]
            if queries and keys:
                heads = _heads(call.offsets, offset)
                yield View(call, first_segment, segments, heads, offset, queries, keys, first_query)


def _heads(offsets: tuple[int, ...], offset: int) -> slice:
    """The heads of one offset; under both rules of ``DilatedPattern`` they are evenly spaced."""
    heads = [head for head, value in enumerate(offsets) if value == offset]
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    return slice(heads[0], heads[-1] + 1, step)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    return torch.unflatten(x, 2, (kv_heads, x.shape[2] // kv_heads))
