"""Stand-ins for the names by which a Gluon kernel calls the hardware."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from triton.experimental.gluon import language as real

from tests.gluon import values
from tests.gluon.memory import Allocation, SharedTile
from tests.gluon.values import EmulationError, Pending, Value, float32, int32, wrapped

RUNNING = SimpleNamespace(program=None)
"""The program that runs now; one at a time."""


def _group():
    return RUNNING.program.group


def _block(x, like=None):
    data = x.data if isinstance(x, Value) else x
    return torch.as_tensor(data) if like is None else torch.as_tensor(data).expand(like)


def _holds(condition):
    return bool(condition)


# Blocks of numbers -----------------------------------------------------------------------------------------------


def arange(start, stop, layout=None):
    length = stop - start
    assert length.bit_count() == 1, "a length that is no power of two"
    return Value(torch.arange(start, stop), int32)


def full(shape, value, dtype, layout=None):
    value = value.data if isinstance(value, Value) else value
    return Value(torch.full(list(map(int, shape)), value, dtype=dtype.torch), dtype)


def zeros(shape, dtype, layout=None):
    return full(shape, 0, dtype)


def where(condition, x, y):
    condition, x, y = wrapped(condition), x, y
    dtype = values._common(x, y) if isinstance(x, Value) or isinstance(y, Value) else wrapped(x).dtype
    first, second = (z.data if isinstance(z, Value) else z for z in (x, y))
    if not isinstance(condition.data, torch.Tensor):
        chosen = Value(first if condition.data else second, dtype)
        shapes = [z.shape for z in (x, y) if isinstance(z, Value) and z.shape]
        return chosen if not shapes or chosen.shape else full(shapes[0], chosen, dtype)
    result = torch.where(
        condition.data, *(torch.as_tensor(z, dtype=dtype.torch) if not isinstance(z, torch.Tensor) else z
                          for z in (first, second))
    )  # fmt: skip
    return Value(result, dtype)


def _reduced(x, result):
    return Value(result, x.dtype)


def block_max(x, axis=None):
    return _reduced(x, x.data.amax(axis))


def block_sum(x, axis=None):
    return _reduced(x, x.data.sum(axis))


def _float_function(function, number_function):
    def apply(x):
        if isinstance(x.data, torch.Tensor):
            return Value(function(x.data), float32)
        return Value(number_function(x.data), float32)

    return apply


exp2 = _float_function(torch.exp2, lambda x: 2.0**x)
log2 = _float_function(torch.log2, lambda x: math.log2(x) if x else -math.inf)


def absolute(x):
    return Value(abs(x.data), x.dtype)


def cdiv(x, y):
    return (x + (y - 1)) // y


def convert_layout(x, layout, assert_trivial=False):
    return x


def join(x, y):
    return Value(torch.stack([x.data, y.data], -1), x.dtype)


def uniform(x):
    x = wrapped(x)
    assert not x.shape
    return x


def lane_bit(like, bit):
    """In the layout of a product's rows, four threads have a row, and eight rows a warp, twice."""
    assert bit >= 2, "columns, not rows, depend on this bit"
    return Value((torch.arange(like.shape[0]) % 8) >> (bit - 2) & 1, int32)


def numbers(*bounds):
    """``range`` of a kernel: its variable is a scalar of the kernel."""
    return (wrapped(number) for number in range(*map(int, bounds)))


def static_numbers(*bounds):
    return range(*map(int, bounds))


# Global memory ---------------------------------------------------------------------------------------------------


def _selected(pointers, mask):
    """``(offsets, mask)`` as blocks of one dimension or more."""
    offsets = _block(pointers.offsets).to(torch.int64)
    if mask is None:
        return offsets, torch.ones_like(offsets, dtype=torch.bool)
    return offsets, _block(mask, offsets.shape)


def load(pointers, mask=None, other=None):
    buffer = pointers.buffer
    offsets, inside = _selected(pointers, mask)
    result = torch.full(offsets.shape, math.nan if buffer.dtype.floating else -1, dtype=buffer.dtype.torch)
    if other is not None:
        result = _block(other, offsets.shape).to(buffer.dtype.torch).clone()
    result[inside] = buffer.read(offsets[inside], RUNNING.program.number, "a load")
    return Value(result, buffer.dtype)


def store(pointers, value, mask=None):
    offsets, inside = _selected(pointers, mask)
    data = _block(value, offsets.shape)
    if isinstance(value, Value) and value.dtype is not pointers.buffer.dtype:
        raise EmulationError(f"{value.dtype.name} is stored where {pointers.buffer.dtype.name} stands")
    _write(pointers.buffer, offsets[inside], data[inside], "a store")


def _write(buffer, offsets, data, what, adds=False):
    if buffer.dtype.floating and bool(data.isnan().any()):
        raise EmulationError(f"{what} writes NaN; {'; '.join(sorted(RUNNING.program.faults))}")
    if adds:
        buffer.check(offsets, what)
        buffer.elements[offsets] += data
    else:
        buffer.write(offsets, data, RUNNING.program.number, what)


# Shared memory and its engines -----------------------------------------------------------------------------------


class Barriers:
    """Barriers ``(count, 1)``."""

    def __init__(self, count):
        self._all = [RUNNING.program.new_barrier() for _ in range(count)]

    def index(self, number):
        if not 0 <= int(number) < len(self._all):
            raise EmulationError(f"barrier {int(number)} of {len(self._all)}")
        return self._all[int(number)]


class MBarrierLayout:
    """The layout of barriers."""


def allocate_shared_memory(dtype, shape, layout):
    if isinstance(layout, MBarrierLayout):
        return Barriers(shape[0]) if len(shape) > 1 else RUNNING.program.new_barrier()
    return SharedTile(Allocation(dtype, shape), RUNNING.program, dtype, shape, layout)


def reinterpret(tile, dtype, shape, layout):
    return tile.reinterpret(dtype, shape, layout)


class _Copy:
    """A copy to a tile that has not landed."""

    def __init__(self, target, read, bytes=0, arrivals=0):
        self.target, self.bytes, self.arrivals, self._read = target, bytes, arrivals, read

    def land(self):
        self.target.put(self._read())


def _begin_copy(target, clock, time):
    target.check_free(_group())
    target.mark_written(clock, time)


def fetch_block(descriptor, position, barrier, target):
    shape = descriptor.block_type.shape
    if target.shape != shape or target.layout != descriptor.layout:
        raise EmulationError(f"a block {shape} of {descriptor.layout} comes to {target.shape} of {target.layout}")
    offsets, inside = descriptor.offsets(position)

    def read():
        data = torch.zeros(shape, dtype=descriptor.dtype.torch)
        data[inside] = descriptor.buffer.copied(offsets[inside])
        return data

    _begin_copy(target, barrier.clock, barrier.phase + 1)
    barrier.in_flight.append(_Copy(target, read, descriptor.block_type.nbytes))


def _written_block(descriptor, position, source):
    if source.shape != descriptor.block_type.shape:
        raise EmulationError(f"a tile {source.shape} goes to a block {descriptor.block_type.shape}")
    group = _group()
    if fault := source.fault_of_reading(group, by_engine=True):
        raise EmulationError(fault)
    source.begin_reading(group)
    group.stores.append(source)
    return descriptor.offsets(position)


def store_block(descriptor, position, source):
    offsets, inside = _written_block(descriptor, position, source)
    _write(descriptor.buffer, offsets[inside], source.values()[inside], "the copy engine")


def reduce_add(descriptor, position, source):
    offsets, inside = _written_block(descriptor, position, source)
    _write(descriptor.buffer, offsets[inside], source.values()[inside], "the copy engine", adds=True)


def fetch_elements(target, pointers, mask=None):
    group, program = _group(), RUNNING.program.number
    offsets, inside = _selected(pointers, mask)
    buffer = pointers.buffer
    buffer.check(offsets[inside], "a copy of elements")

    def read():
        data = torch.zeros(offsets.shape, dtype=buffer.dtype.torch)
        data[inside] = buffer.read(offsets[inside], program, "a copy of elements")
        return data

    _begin_copy(target, group.number, 2**60)
    group.copies.append(_Copy(target, read))


def arrive_behind_copies(barrier, increment_count=True):
    """All threads of the group arrive once their copies are done."""
    assert not increment_count
    group = _group()
    for copy in group.copies:
        copy.target.mark_written(barrier.clock, barrier.phase + 1)
    group.release(barrier._gathered)
    barrier.in_flight += [*group.copies, _Landing(group.threads)]
    group.copies.clear()


class _Landing:
    """What comes behind all copies of a group: its arrivals."""

    bytes = 0

    def __init__(self, arrivals):
        self.arrivals = arrivals

    def land(self):
        pass


class _Product:
    """A product of the matrix units, which may read its tiles until it is waited for.

    Of tiles that its group must not read yet comes NaN. Kernels begin such products, but do not use them.
    """

    def __init__(self, group, tiles):
        self.tiles, self.finished = tiles, False
        for tile in tiles:
            tile.begin_reading(group)
        group.products.append(self)

    def finish(self, group):
        self.finished = True
        for tile in self.tiles:
            tile.end_reading(group)


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False):
    group = _group()
    tiles = [x for x in (a, b) if isinstance(x, SharedTile)]
    faults = {tile: tile.fault_of_reading(group, by_engine=True) for tile in tiles}
    product = _Product(group, [tile for tile in tiles if not faults[tile]])
    start = acc.value if isinstance(acc, Pending) else acc  # products in a row may share a sum
    result = _sum_of_products(a, b, start.data if use_acc else 0.0)
    if fault := next(filter(None, faults.values()), ""):  # right, as long as nobody uses the result
        RUNNING.program.faults.add(fault)
        result.fill_(math.nan)
    result = Value(result, float32)
    pending = Pending(result, product)
    return pending if is_async else warpgroup_mma_wait(0, deps=[pending])


def _sum_of_products(a, b, start):
    left, right = (x.values() if isinstance(x, SharedTile) else x.data for x in (a, b))
    if left.dtype != right.dtype:
        raise EmulationError(f"a product of {left.dtype} and {right.dtype}")
    return left.float() @ right.float() + start


def warpgroup_mma_wait(outstanding=0, deps=None):
    _group().finish_products(int(outstanding))
    found = [x.value if isinstance(x, Pending) and x.product.finished else x for x in deps]
    return found[0] if len(found) == 1 else tuple(found)


def warp_specialize(partitions, warps, registers):
    RUNNING.program.specialize(partitions, warps)


mbarrier = SimpleNamespace(
    MBarrierLayout=MBarrierLayout,
    init=lambda barrier, count: barrier.init(count),
    expect=lambda barrier, size, pred=True: barrier.arrive(_group(), 1, int(size)) if _holds(pred) else None,
    arrive=lambda barrier, count=1, pred=True: barrier.arrive(_group(), count) if _holds(pred) else None,
    wait=lambda barrier, phase, pred=True: barrier.wait(_group(), int(phase)) if _holds(pred) else None,
)


def _meet(barrier, threads):
    RUNNING.program.named_barrier(barrier).meet(_group(), int(threads))
    _group().meet_itself()


def _store_wait(pendings):
    assert pendings == 0
    _group().finish_stores()
    _group().meet_itself()  # the compiler puts a barrier there


gl = SimpleNamespace(
    constexpr=lambda x: x, tensor=Value, int1=values.int1, int32=int32, int64=values.int64, float32=float32,
    float16=values.float16, bfloat16=values.bfloat16, arange=arange, full=full, zeros=zeros, where=where,
    minimum=values.minimum, maximum=values.maximum, max=block_max, sum=block_sum, exp2=exp2, log2=log2, abs=absolute,
    math=SimpleNamespace(log2=log2), cdiv=cdiv, convert_layout=convert_layout, join=join, load=load, store=store,
    program_id=lambda axis: wrapped(RUNNING.program.number), static_range=static_numbers,
    allocate_shared_memory=allocate_shared_memory, warp_specialize=warp_specialize,
    SliceLayout=lambda dim, parent: None, DotOperandLayout=lambda index, parent, width: None,
    BlockedLayout=lambda *arguments: None, NVMMADistributedLayout=lambda *arguments: None,
    NVMMASharedLayout=real.NVMMASharedLayout, SwizzledSharedLayout=real.SwizzledSharedLayout,
)  # fmt: skip

STAND_INS = {
    "gl": gl, "tl": gl, "range": numbers, "mbarrier": mbarrier, "gluon": None, "triton": None,
    "tma": SimpleNamespace(store_wait=_store_wait),
    "async_copy": SimpleNamespace(mbarrier_arrive=arrive_behind_copies),
    "warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait,
    "fence_async_shared": lambda: _group().fence(), "group_barrier": lambda: _group().meet_itself(),
    "reinterpret": reinterpret, "fetch_block": fetch_block, "store_block": store_block,
    "fetch_elements": fetch_elements, "reduce_add": reduce_add, "copies_read": lambda: _group().finish_stores(),
    "arrive": lambda barrier, threads: RUNNING.program.named_barrier(barrier).arrive(_group(), int(threads)),
    "meet": _meet, "opaque_zero": lambda: Value(0, int32), "lane_bit": lane_bit, "uniform": uniform,
}  # fmt: skip
