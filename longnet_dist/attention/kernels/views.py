"""Strided views of a piece: the problems of a dense attention kernel, without copying a row.

All segments of equal length and all key/value heads of equal, or of evenly rising, offset form one batch of attention
problems whose rows are ``r`` apart in the sequence. A kernel that takes strides computes them in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longnet_dist.attention.kernels.contract import Call


@dataclass(frozen=True, slots=True)
class View:
    """Describe a batch of equal problems: ``segments`` segments, the kv heads ``heads``, ``queries`` rows by ``keys``.

    Attributes:
        first_query: index ``j`` of the first query; a causal query ``j`` sees keys ``i <= j``.
        slant: by how many rows the offset grows from one of the heads to the next.
    """

    call: Call
    first_segment: int
    segments: int
    heads: slice
    offset: int
    queries: int
    keys: int
    first_query: int
    slant: int = 0

    def query_rows(self, x: Tensor) -> Tensor:
        """View the queries' rows of a ``(B, n, H, …)`` buffer as ``(B, segments, queries, heads, H / Hkv, …)``."""
        piece = self.call.piece
        row = piece.queries(self.first_segment, self.offset)[0]
        return self._rows(_grouped(x, len(self.call.offsets)), row, self.queries, piece.dilation_rate, self.slant)

    def key_rows(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """View keys ``start … stop-1`` of a ``(B, rows, Hkv, D)`` buffer as ``(B, segments, keys, heads, D)``."""
        row, _, step = self.call.piece.keys(self.first_segment, self.offset)
        stop = self.keys if stop is None else stop
        return self._rows(x, row + start * step, stop - start, step, self.slant)

    def split(self, most_segments: int) -> Iterator[View]:
        """Yield the same rows in views of at most ``most_segments`` segments."""
        for done in range(0, self.segments, most_segments):
            count = min(most_segments, self.segments - done)
            yield replace(self, first_segment=self.first_segment + done, segments=count)

    def _rows(self, x: Tensor, row: int, count: int, step: int, slant: int) -> Tensor:
        x = x[:, :, self.heads]
        strides = list(x.stride())
        width = self.call.piece.segment_length
        # Row i of segment s and head h is at row + s·w + i·step + h·slant: an affine map, so strides reach all of them.
        return x.as_strided(
            (x.shape[0], self.segments, count, *x.shape[2:]),
            (strides[0], width * strides[1], step * strides[1], strides[2] + slant * strides[1], *strides[3:]),
            x.storage_offset() + row * strides[1],
        )


def views(call: Call) -> Iterator[View]:
    """Yield the views of a piece, without those that have no queries or no keys."""
    for first_segment, segments in call.piece.runs():
        for heads, offset, slant in _head_groups(call, first_segment):
            _, queries, first_query = call.piece.queries(first_segment, offset)
            keys = call.piece.keys(first_segment, offset)[1]
            if queries and keys:
                yield View(call, first_segment, segments, heads, offset, queries, keys, first_query, slant)


def _head_groups(call: Call, segment: int) -> Iterator[tuple[slice, int, int]]:
    """Yield ``(heads, offset of the first, slant)`` of the fewest groups of heads that one stride reaches.

    A group is all heads of an offset. Where all offsets keep equally many rows, it is a run of heads with offsets 0, 1,
    2, ….
    """
    offsets, rate = call.offsets, call.piece.dilation_rate
    distinct = sorted(set(offsets))
    runs = [head for head, offset in enumerate(offsets) if offset == 0]
    rising = all(offset == head % rate for head, offset in enumerate(offsets))
    kept = {(call.piece.queries(segment, x)[1:], call.piece.keys(segment, x)[1]) for x in distinct}
    if rising and len(kept) == 1 and len(runs) < len(distinct) and not call.piece.compact:
        for head in runs:
            yield slice(head, min(head + rate, len(offsets))), 0, 1
    else:
        for offset in distinct:
            for heads in _evenly_spaced([head for head, value in enumerate(offsets) if value == offset]):
                yield heads, offset, 0


def dense_problems(
    view: View, query_buffers: tuple[Tensor, ...], key_buffers: tuple[Tensor, ...]
) -> Iterator[tuple[list[Tensor], list[Tensor], bool]]:
    """Yield the view as problems ``(segments, rows, heads, …)`` of a kernel whose causal mask starts at index 0.

    Queries that do not start at index 0 see all earlier keys, then a triangle: two problems. The query heads of a
    key/value head are problems of their own, and batch elements too, unless one stride reaches all their segments.
    """
    batch, heads_per_kv = query_buffers[0].shape[0], query_buffers[0].shape[2] // len(view.call.offsets)
    queries = [view.query_rows(x) for x in query_buffers]
    first = view.first_query
    # A causal query j sees the keys i <= j, so queries f … f+m-1 see the keys i < f whole and the next m as a triangle.
    # Two calls may cover them, since the running softmax merges any split of the keys.
    if view.call.causal and view.queries == 1:  # a decoded row
        spans = [(0, min(first + 1, view.keys), False)]
    elif view.call.causal:
        spans = [(0, min(first, view.keys), False), (first, min(first + view.queries, view.keys), True)]
    else:
        spans = [(0, view.keys, False)]
    for start, stop, causal in spans:
        if start >= stop:
            continue
        keys = [view.key_rows(x, start, stop) for x in key_buffers]
        for element in range(batch):
            for member in range(heads_per_kv):
                yield (
                    [x[element, :, :, :, member] for x in queries],
                    [x[element] for x in keys],
                    causal,
                )


def _evenly_spaced(heads: list[int]) -> Iterator[slice]:
    """Cut ascending heads into the longest runs that one stride reaches; under ``modulo`` and ``blocked`` into one."""
    first = 0
    while first < len(heads):
        step = heads[first + 1] - heads[first] if first + 1 < len(heads) else 1
        stop = first + 1
        while stop < len(heads) and heads[stop] - heads[stop - 1] == step:
            stop += 1
        yield slice(heads[first], heads[stop - 1] + 1, step)
        first = stop


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    return torch.unflatten(x, 2, (kv_heads, x.shape[2] // kv_heads))
