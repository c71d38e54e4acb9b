"""Launches of Triton kernels, each worked out once for a call and the geometry of its buffers.

What is worked out again for every launch (views, grids, checks, and Triton's search for what it compiled) takes longer
than a kernel runs on short sequences. It depends on the geometry alone, so a launch is kept and given other tensors.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from longnet_dist.attention.kernels.contract import Call
from longnet_dist.attention.kernels.triton.assembler import assembler
from longnet_dist.caches import bounded_cache
from longnet_dist.geometry.documents import Integers, SegmentTable
from longnet_dist.geometry.window import Piece
from longnet_dist.numerics import COMPILE, block_dim

FORWARD_SIDES, BACKWARD_SIDES = "qkkqqq", "qqkkqqkk"
"""Where the buffers of a launch stand: with the window's rows, ``"q"``, or where the keys do, ``"k"``."""


class Geometry(NamedTuple):
    """All of a buffer ``(B, rows, H, …)`` that a launch depends on but its address.

    Attributes:
        aligned: whether it begins at a multiple of 16 bytes, which kernels are compiled for.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool

    @classmethod
    def of(cls, x: Tensor) -> Geometry:
        return cls(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)

    @classmethod
    def new(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Geometry:
        """Return the geometry that ``torch.empty`` gives."""
        strides = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
        return cls(shape, strides, dtype, device, True)

    def behind(self, row: int) -> Geometry:
        """Return the geometry of ``x[:, row:]``."""
        aligned = self.aligned and row * self.stride[1] * self.dtype.itemsize % 16 == 0
        return self._replace(shape=(self.shape[0], self.shape[1] - row, *self.shape[2:]), aligned=aligned)


class View(NamedTuple):
    """Say how the copy engine sees a buffer: a ``kind`` of tensor descriptor and its arguments."""

    kind: Any
    arguments: tuple[Any, ...]


def _specialized(number: Any) -> Hashable:
    """Return what Triton compiles for: whether an integer is 1 or a multiple of 16, what is None, and so in tuples."""
    if isinstance(number, tuple):
        return tuple(map(_specialized, number))
    if isinstance(number, int):
        return number == 1, number % 16 == 0
    return type(number).__name__


class Launch:
    """A launch with all its arguments but the tensors.

    Args:
        kernel: takes tensors, then ``numbers``, then ``constants``.
        programs: of the launch.
        views: of each tensor, None where the kernel takes the tensor itself.
        numbers: integers, floats and tuples of integers.
        constants: compiled into the kernel, by name.
        options: of the compiler.
        first_rows: of each tensor, where the kernel sees it begin.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        views: tuple[View | None, ...],
        numbers: tuple[Any, ...],
        constants: dict[str, Any],
        options: dict[str, int | None],
        first_rows: tuple[int, ...] = (),
    ) -> None:
        self.kernel, self._grid, self._views, self._numbers = kernel, (programs, 1, 1), views, numbers
        self._constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        self._options, self._first_rows = COMPILE | options, first_rows if any(first_rows) else ()
        self._compiled: Any = None

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on the first of ``tensors``, as many as the kernel takes, all of the geometry it was made for."""
        if self._grid[0] == 0:  # no document reaches behind the first half of a segment
            return
        if self._first_rows:
            tensors = tuple(x[:, row:] for x, row in zip(tensors, self._first_rows, strict=False))
        sources = [view.kind(x, *view.arguments) if view else x for x, view in zip(tensors, self._views, strict=False)]
        if self._compiled:
            self._compiled[self._grid](*sources, *self._numbers, *self._constants.values())
        else:  # Triton's interpreter compiles nothing and comes here every time
            with assembler(self.kernel) as options:
                arguments = self._constants | self._options | options
                self._compiled = self.kernel[self._grid](*sources, *self._numbers, **arguments)

    @property
    def kind(self) -> Hashable:
        """Return what launches have in common that run, but for dtypes and alignment, the same compiled kernel."""
        constants, options = tuple(self._constants.items()), tuple(self._options.items())
        return self.kernel, constants, options, _specialized(self._numbers)

    def compile(self, buffers: Sequence[Geometry], options: dict[str, Any]) -> None:
        """Compile the kernel for tensors of these geometries, and launch nothing; ``options`` of an ``assembler``."""
        seen = [x.behind(row) for x, row in zip(buffers, self._first_rows or (0,) * len(buffers), strict=False)]
        # Of a tensor the compiler sees dtype and alignment.
        tensors = [torch.empty(9, dtype=x.dtype, device=x.device)[0 if x.aligned else 1 :] for x in seen]
        sources = [view.kind(x, *view.arguments) if view else x for x, view in zip(tensors, self._views, strict=False)]
        arguments = self._constants | self._options | options
        self.kernel.warmup(*sources, *self._numbers, grid=self._grid, **arguments)


@dataclass(frozen=True)
class Problem:
    """Tell the kernels about a call on queries of geometry ``q`` and keys of geometry ``k``.

    ``first_row`` is the row of the window's buffers with which those that the kernel sees begin.
    """

    call: Call
    q: Geometry
    k: Geometry
    first_row: int = 0

    @property
    def piece(self) -> Piece:
        return self.call.piece

    @property
    def dim(self) -> int:
        return self.q.shape[3]

    @property
    def block_dim(self) -> int:
        return block_dim(self.dim)

    @property
    def wide(self) -> bool:
        """Say whether the inputs are float32."""
        return self.q.dtype == torch.float32

    @property
    def limit(self) -> float:
        """Return the largest sum of a softmax whose maximum was kept, and 1 over the smallest."""
        return 2.0**15 if self.q.dtype == torch.float16 else 2.0**100

    @property
    def causal(self) -> bool:
        """Say whether a mask divides keys that a query sees from others."""
        return self.call.causal and not self.piece.half

    @property
    def head_rule(self) -> int | tuple[int, ...]:
        """Return what gives a head its offset: the ``b`` of ``(h // b) % r``, or a table of all offsets."""
        return self.call.offsets if self.call.head_block is None else self.call.head_block

    @property
    def heads_before(self) -> int | None:
        """Return the ``c`` of ``((h + c) // b) % r``; None for 0, which the kernels are compiled without."""
        return self.call.heads_before or None

    @property
    def overlaps(self) -> int:
        """Four bits for each branch that leaves pairs to this one: 1 plus the logarithm of its relative rate."""
        return sum(rate.bit_length() << 4 * number for number, rate in enumerate(self.piece.overlap_rates))

    @cached_property
    def queries(self) -> int:
        """Return the most queries that a (segment, head) of the piece has."""
        piece = self.piece
        if piece.table is not None:
            longest = int(self._segment_rows[0].max())
        else:
            longest = -piece.half if piece.half < 0 else piece.segment_length - piece.half
        return -(-min(longest, piece.query_stop - piece.query_start) // piece.dilation_rate)

    @cached_property
    def keys(self) -> int:
        """Return the most keys that a (segment, head) of the piece has."""
        piece = self.piece
        if piece.table is not None:
            rows = int(self._segment_rows[1].max())
        else:
            width = piece.half if piece.half > 0 else piece.segment_length + piece.half
            rows = min(width, piece.key_stop - piece.first_segment * width)
        return -(-rows // piece.dilation_rate)

    @cached_property
    def _segment_rows(self) -> tuple[Integers, Integers]:
        return rows_of_segments(self.piece)

    @property
    def key_rate(self) -> int:
        """Return the rows from one key to the next in their buffer."""
        return 1 if self.piece.compact else self.piece.dilation_rate

    @property
    def fits(self) -> bool:
        """Say whether all rows of the piece lie in ``rows // r`` whole rows of the view ``(rows / r, r, ...)``.

        A last row that is not whole would let the copy engine read behind the buffer.
        """
        piece, rows = self.piece, self.q.shape[1]
        whole = rows // piece.dilation_rate * piece.dilation_rate
        return max(piece.query_stop, 0 if piece.compact else piece.key_stop) - piece.window_start <= whole

    def parts(self, split_tables: bool = False) -> Iterator[Problem]:
        """Yield parts that the copy engine can see: all but the last segment, and that with other buffers.

        If the last row of the view is not whole, one that begins with the first row that makes it so takes its place.

        Args:
            split_tables: whether segments of a table that end there are a part of their own, without the copy engine;
                else it is not used for any of them.
        """
        piece, rest = self.piece, self
        if self.fits or (piece.table is not None and not split_tables):
            yield self
            return
        if piece.table is not None:
            whole = self.q.shape[1] // piece.dilation_rate * piece.dilation_rate + piece.window_start
            yield from (self._with(part) for part in _split_table(piece, whole))
            return
        if piece.num_segments > 1:
            last = piece.first_segment + piece.num_segments - 1
            cut = last * piece.segment_length
            yield self._with(replace(piece, num_segments=piece.num_segments - 1, query_stop=cut, key_stop=cut))
            rest = self._with(replace(piece, first_segment=last, num_segments=1, query_start=cut))
        yield rest._behind(self.q.shape[1] % piece.dilation_rate)

    def first_rows(self, sides: str) -> tuple[int, ...]:
        """Return the rows at which the kernels see buffers begin."""
        row = {"q": self.first_row, "k": 0 if self.piece.compact else self.first_row}
        return tuple(row[side] for side in sides)

    def seen(self, buffers: tuple[Geometry, ...], sides: str) -> tuple[Geometry, ...]:
        """Return the buffers from there on."""
        return tuple(x.behind(row) for x, row in zip(buffers, self.first_rows(sides), strict=True))

    def _with(self, piece: Piece) -> Problem:
        return replace(self, call=replace(self.call, piece=piece))

    def _behind(self, row: int) -> Problem:
        """The same on buffers without their first ``row`` rows, unless it needs these."""
        piece = self.piece
        first = piece.query_start if piece.compact else piece.first_segment * piece.segment_length
        if min(first, piece.query_start) - piece.window_start < row:
            return self
        moved = self._with(replace(piece, window_start=piece.window_start + row))
        return replace(moved, q=self.q.behind(row), k=self.k if piece.compact else self.k.behind(row), first_row=row)

    def programs(self, rows: int, tile: int, heads: int) -> int:
        """One for each tile of ``rows`` in each (segment, head) of each sequence."""
        return -(-rows // tile) * self.piece.num_segments * self.q.shape[0] * heads

    def numbers(self, rows: int, tile: int, heads: int, *buffers: Geometry) -> tuple[Any, ...]:
        """Strides of the buffers, then the integers that all kernels take, then the scale."""
        piece = self.piece
        return (
            *(x.stride[:3] for x in buffers),
            -(-rows // tile),
            piece.num_segments,
            heads,
            self.q.shape[2] // self.k.shape[2],
            self.head_rule,
            piece.segment_length,
            piece.dilation_rate,
            piece.first_segment,
            piece.window_start,
            piece.query_start,
            piece.query_stop,
            piece.key_stop,
            piece.half,
            self.overlaps,
            self.call.scale,
        )

    def table(self) -> Tensor | None:
        """Return ``(segments, 3)`` int64 on the device, the columns of a ``SegmentTable``; None without one."""
        return None if self.piece.table is None else _device_table(self.piece.table, self.q.device)

    def constants(self, described: bool) -> dict[str, Any]:
        """Return what the portable kernels are compiled for, but their tiles."""
        return {
            "D": self.dim,
            "BLOCK_D": self.block_dim,
            "CAUSAL": self.causal,
            "OVERLAPS": self.overlaps > 0,
            "COMPACT": self.piece.compact,
            "DESCRIPTORS": described,
            "PRECISION": "ieee" if self.wide else "tf32",
        }

    def describable(self, queries: tuple[Geometry, ...], keys: tuple[Geometry, ...]) -> bool:
        """Say whether the copy engine can see all these buffers as ``(B, rows / r, r, H, D)``."""
        rates = [self.piece.dilation_rate] * len(queries) + [self.key_rate] * len(keys)
        return self.fits and all(_describable(x, rate) for x, rate in zip((*queries, *keys), rates, strict=True))


def block_view(x: Geometry, rate: int, rows: int) -> View:
    """Tiles of ``rows`` rows of a head, ``rate`` rows apart, for Triton's own kernels."""
    batch, length, heads, dim = x.shape
    stride = x.stride
    shape = [batch, length // rate, rate, heads, dim]
    strides = [stride[0], rate * stride[1], stride[1], stride[2], 1]
    return View(TensorDescriptor, (shape, strides, [1, rows, 1, 1, block_dim(dim)]))


def _describable(x: Geometry, rate: int) -> bool:
    apart = all(stride > 0 and stride * x.dtype.itemsize % 16 == 0 for stride in x.stride[:3])  # not expanded
    return x.aligned and x.shape[1] >= rate and apart


@bounded_cache(maxsize=128)
def _device_table(table: SegmentTable, device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack([table.starts, table.stops, table.leads], 1)).to(device)


@bounded_cache(maxsize=256)
def _split_table(piece: Piece, whole: int) -> tuple[Piece, ...]:
    """Return the segments whose rows end at row ``whole`` or before, and the others, where there are any.

    They are the same objects for each launch of a piece, by which it finds its table of tiles.
    """
    assert piece.table is not None
    table, parts = piece.table, []
    inside = np.minimum(table.stops, max(piece.query_stop, 0 if piece.compact else piece.key_stop)) <= whole
    for some in (inside, ~inside):
        if not some.any():
            continue
        part = SegmentTable(table.starts[some], table.stops[some], table.leads[some])
        found = replace(piece, table=part, num_segments=len(part))
        if some is inside:
            key_stop = piece.key_stop if piece.compact else min(piece.key_stop, whole)
            found = replace(found, query_stop=min(piece.query_stop, whole), key_stop=key_stop)
        parts.append(found)
    return tuple(parts)


def rows_of_segments(piece: Piece) -> tuple[Integers, Integers]:
    """Return the rows ``(segments,)`` among which the queries of each segment lie, and its keys."""
    assert piece.table is not None
    starts, stops = piece.table.starts, piece.table.stops
    query_start, query_stop = np.maximum(starts, piece.query_start), np.minimum(stops, piece.query_stop)
    key_start, key_stop = starts, np.minimum(stops, piece.key_stop)
    if piece.half:
        middle = starts + np.maximum(abs(piece.half) - piece.table.leads, 0)
        if piece.half > 0:
            query_start, key_stop = np.maximum(query_start, middle), np.minimum(key_stop, middle)
        else:
            query_stop, key_start = np.minimum(query_stop, middle), middle
    return np.maximum(query_stop - query_start, 0), np.maximum(key_stop - key_start, 0)
