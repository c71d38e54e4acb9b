"""Global and shared memory of an emulated kernel, and who may touch what when.

Shared memory is watched in cells of 256 bytes. A cell knows its last write and the last reads, each as a number on a
clock: every group of warps has a clock, and every barrier in memory, which ticks with its phases. A group carries the
latest times that it knows of all clocks, and learns those of others where they meet. So an access is right only if the
group knows the accesses that it depends on, in whatever order the groups happen to run here.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from tests.gluon.values import DTYPES, BlockType, EmulationError, Pointer, Value, int64

CELL = 256  # bytes
GROUPS = 8  # at most, in a program


class Buffer:
    """A tensor in global memory; what lies between its elements, and around it, is not its own."""

    def __init__(self, tensor):
        self.dtype = DTYPES[tensor.dtype]
        reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.elements = tensor.detach().as_strided((reach,), (1,))
        own = torch.zeros(reach, dtype=torch.bool)
        own.as_strided(tensor.shape, tensor.stride(), 0).fill_(True)
        self.own, self.writer = own, torch.full((reach,), -1, dtype=torch.int32)

    def check(self, offsets, what):
        """Raise unless all ``offsets`` are elements of the tensor."""
        if offsets.numel() == 0:
            return
        least, most = int(offsets.min()), int(offsets.max())
        if least < 0 or most >= len(self.own) or not bool(self.own[offsets].all()):
            raise EmulationError(f"{what} out of bounds: elements {least} … {most} of {len(self.own)}")

    def read(self, offsets, program, what):
        self.check(offsets, what)
        writers = self.writer[offsets]
        if bool(((writers != -1) & (writers != program)).any()):
            raise EmulationError(f"{what} reads what another program of the launch writes")
        return self.elements[offsets]

    def copied(self, offsets):
        """What the copy engine reads, whole tiles: NaN where the launch writes, for nobody may use that."""
        self.check(offsets, "the copy engine")
        return torch.where(self.writer[offsets] == -1, self.elements[offsets], torch.nan)

    def write(self, offsets, values, program, what):
        self.check(offsets, what)
        writers = self.writer[offsets]
        if bool(((writers != -1) & (writers != program)).any()):
            raise EmulationError(f"{what} writes what another program of the launch wrote")
        self.writer[offsets] = program
        self.elements[offsets] = values.to(self.elements.dtype)


class Descriptor:
    """A matrix in global memory as the copy engine sees it."""

    def __init__(self, host, buffer):
        self.buffer, self.layout = buffer, host.layout
        self.dtype = buffer.dtype
        self.sizes, self.strides = list(map(int, host.shape)), list(map(int, host.strides))
        self.block_type = BlockType(tuple(map(int, host.block_shape)), self.dtype)

    def offsets(self, position):
        """``(offsets, inside)`` of the elements of a block; those outside the matrix are not touched."""
        places = [int(first) + torch.arange(size) for first, size in zip(position, self.block_type.shape, strict=True)]
        rows, columns = places[0][:, None], places[1][None, :]
        inside = (rows >= 0) & (rows < self.sizes[0]) & (columns >= 0) & (columns < self.sizes[1])
        return rows * self.strides[0] + columns * self.strides[1], inside


@lru_cache(maxsize=256)
def places(layout, shape, dtype):
    """The element of shared memory at which each element of a tile stands; leading dimensions are whole tiles.

    A swizzle of 128 bytes is that of the hardware: 16 bytes at chunk ``c`` of row ``i`` stand at ``c ^ (i % 8)``.
    """
    kind = type(layout).__name__
    rank = layout.rank if kind == "NVMMASharedLayout" else _rank(layout)
    inner = shape[len(shape) - rank :]
    if kind == "NVMMASharedLayout" and rank == 2:
        tile = _swizzled(layout.swizzle_byte_width, *inner, dtype.primitive_bitwidth // 8)
    elif kind == "SharedLinearLayout":
        tile = _linear(layout.offset_bases, inner)
    else:
        tile = torch.arange(math.prod(inner)).reshape(inner)
    tiles = torch.arange(math.prod(shape) // max(1, tile.numel())) * tile.numel()
    return (tiles.reshape(shape[: len(shape) - rank] + (1,) * rank) + tile).contiguous()


def _rank(layout):
    if type(layout).__name__ == "SharedLinearLayout":
        return len(layout.offset_bases[0])
    return len(layout.order) if hasattr(layout, "order") else 1


def _swizzled(width, rows, columns, size):
    """Columns in groups of ``width`` bytes, one group of all rows behind the other."""
    together = max(1, min(columns, width // size if width else columns))
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    within = column % together
    if width == 128:
        chunk = 16 // size
        within = ((within // chunk) ^ (row % 8)) * chunk + within % chunk
    return column // together * (rows * together) + row * together + within


def _linear(bases, shape):
    offset = torch.arange(2 ** len(bases))
    place = torch.zeros(len(shape), len(offset), dtype=torch.int64)
    for bit, base in enumerate(bases):
        for dim, number in enumerate(base):
            place[dim] ^= (offset >> bit & 1) * number
    tile = torch.full(shape, -1)
    tile[tuple(place)] = offset
    assert int(tile.min()) == 0, "a layout that leaves places out"
    return tile


class Allocation:
    """A part of shared memory, and what happened to each of its cells.

    Attributes:
        written: clock and time of the last write; ``-1`` for never.
        read: time of the last read of each group.
        reading: products and copies that may still read.
        unfenced: whether threads wrote what the copy engine and the matrix units do not see yet.
        leaving: whether one thread alone knows that the copy engine is done with reading.
    """

    def __init__(self, dtype, shape):
        self.dtype, self.elements = dtype, torch.zeros(math.prod(shape), dtype=dtype.torch)
        cells = -(-self.elements.nbytes // CELL)
        self.written = np.full((2, cells), -1)
        self.read = np.full((GROUPS, cells), -1)
        self.reading, self.unfenced, self.leaving = np.zeros((3, cells), dtype=np.int64)


class SharedTile:
    """A view of shared memory."""

    def __init__(self, allocation, program, dtype, shape, layout, base=0, order=None):
        self.allocation, self.program, self.dtype = allocation, program, dtype
        self.shape, self.layout, self.base, self.order = tuple(map(int, shape)), layout, base, order
        if dtype.torch is not allocation.dtype.torch:
            raise EmulationError(f"memory for {allocation.dtype.name} is used for {dtype.name}")

    @property
    def type(self):
        return BlockType(self.shape, self.dtype, self.layout)

    def index(self, number):
        number, size = int(number), math.prod(self.shape[1:])
        if not 0 <= number < self.shape[0]:
            raise EmulationError(f"tile {number} of {self.shape[0]}")
        return SharedTile(
            self.allocation, self.program, self.dtype, self.shape[1:], self.layout, self.base + number * size
        )

    def permute(self, order):
        assert (self.order, tuple(order)) == (None, (1, 0))
        return SharedTile(self.allocation, self.program, self.dtype, self.shape, self.layout, self.base, order)

    def reinterpret(self, dtype, shape, layout):
        if math.prod(map(int, shape)) != math.prod(self.shape):
            raise EmulationError(f"a tile of shape {self.shape} is no {list(shape)}")
        return SharedTile(self.allocation, self.program, dtype, shape, layout, self.base)

    def _places(self):
        return self.base + places(self.layout, self.shape, self.dtype)

    @property
    def cells(self):
        """The cells that the tile covers, as a slice."""
        size = self.dtype.primitive_bitwidth // 8
        return slice(self.base * size // CELL, -(-(self.base + math.prod(self.shape)) * size // CELL))

    def values(self):
        """What the tile holds, unchecked."""
        data = self.allocation.elements[self._places()]
        return data if self.order is None else data.permute(self.order)

    def put(self, data):
        """Let it hold ``data``, unchecked."""
        self.allocation.elements[self._places()] = data

    def load(self, layout=None):
        group = self.program.group
        if fault := self.fault_of_reading(group):
            raise EmulationError(fault)
        self.allocation.read[group.number, self.cells] = group.known[group.number]
        return Value(self.values(), self.dtype)

    def store(self, value):
        if value.shape != self.shape or value.dtype is not self.dtype:
            raise EmulationError(
                f"a block {value.shape} of {value.dtype.name} goes to a tile {self.shape} of {self.dtype.name}"
            )
        group = self.program.group
        self.check_free(group)
        if self.allocation.leaving[self.cells].any():
            raise EmulationError("a group writes where one of its threads alone knows that the copy engine has read")
        self.mark_written(group.number, group.known[group.number])
        self.allocation.unfenced[self.cells] = 1
        group.unfenced.append(self)
        self.put(value.data)

    def mark_written(self, clock, time):
        self.allocation.written[0, self.cells], self.allocation.written[1, self.cells] = clock, time

    def fault_of_reading(self, group, by_engine=False):
        """Why the group must not read the tile; an empty string if it knows of the last write of all cells."""
        clock, time = self.allocation.written[:, self.cells]
        if (clock < 0).any():
            return f"{group.name} reads shared memory that nobody wrote"
        if (group.known[clock] < time).any():
            return f"{group.name} reads shared memory without having waited for what is written there"
        if by_engine and self.allocation.unfenced[self.cells].any():
            return f"{group.name}: a fence is missing between what threads write and the engines read"
        return ""

    def check_free(self, group):
        """Raise unless the group knows of the last write and all reads of all cells."""
        clock, time = self.allocation.written[:, self.cells]
        if (group.known[clock] < time)[clock >= 0].any():
            raise EmulationError(f"{group.name} writes shared memory without having waited for what is written there")
        if self.allocation.reading[self.cells].any():
            raise EmulationError(f"{group.name} writes shared memory that a product or a copy may still read")
        read = self.allocation.read[:, self.cells]
        if (read > group.known[: len(read), None]).any():
            raise EmulationError(f"{group.name} writes shared memory without having waited for those who read it")

    def begin_reading(self, group):
        """An engine reads from now on, until :meth:`end_reading`."""
        self.allocation.reading[self.cells] += 1

    def end_reading(self, group, leaving=False):
        self.allocation.reading[self.cells] -= 1
        self.allocation.read[group.number, self.cells] = group.known[group.number]
        if leaving:
            self.allocation.leaving[self.cells] = 1


def pointer_to(buffer):
    """The address of a buffer's first element."""
    return Pointer(buffer, Value(0, int64))
