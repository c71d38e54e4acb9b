"""The emulator finds what the hardware leaves undefined."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longnet_dist.attention.kernels.hopper import launches
from longnet_dist.attention.kernels.hopper.gluon_api import fetch_block, group_barrier, store_block
from longnet_dist.attention.kernels.hopper.instructions import arrive, copies_read, meet
from longnet_dist.geometry.pattern import DilatedPattern
from tests.gluon import language
from tests.gluon.attention import EmulatedKernel, attended, inputs
from tests.gluon.emulator import Emulated
from tests.gluon.memory import places
from tests.gluon.values import EmulationError, Value, float32, int32

VECTOR = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
LAYOUT = gl.NVMMASharedLayout(128, 16, 2)


def launch(kernel, *arguments, **constants):
    Emulated(kernel)[(1, 1, 1)](*arguments, num_warps=4, **constants)


@gluon.jit
def add_one(source, target, count, STRIDE: gl.constexpr):
    index = gl.arange(0, 16, VECTOR)
    gl.store(target + index, gl.load(source + index * STRIDE, mask=index < count, other=0.0) + 1, mask=index < count)


def test_addresses_under_a_mask_must_be_in_bounds():
    source, target = torch.arange(20.0), torch.zeros(16)
    launch(add_one, source, target, 10, STRIDE=2)
    assert target.tolist() == [*range(1, 20, 2)] + [0] * 6
    with pytest.raises(EmulationError, match="a load out of bounds"):
        launch(add_one, source, target, 11, STRIDE=2)
    with pytest.raises(EmulationError, match="a store out of bounds"):
        launch(add_one, torch.zeros(40), target[:9], 10, STRIDE=2)
    with pytest.raises(EmulationError, match="a load out of bounds"):  # between the rows of a slice
        launch(add_one, torch.zeros(8, 4)[:, :2], target, 4, STRIDE=1)


@gluon.jit
def write_place(target):
    gl.store(target, gl.program_id(0))


def test_two_programs_must_not_write_one_place():
    with pytest.raises(EmulationError, match="another program"):
        Emulated(write_place)[(2, 1, 1)](torch.zeros(1, dtype=torch.int32), num_warps=4)


@gluon.jit
def never_ends(target, BOTH: gl.constexpr):
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=2)
    gl.warp_specialize([(_waits, (bar,)), (_arrives, (bar, BOTH))], [4], [24])


@gluon.jit
def _waits(bar):
    mbarrier.wait(bar, 0)
    meet(4, 256)


@gluon.jit
def _arrives(bar, BOTH: gl.constexpr):
    for _ in range(2 if BOTH else 1):
        mbarrier.arrive(bar)
    arrive(4, 256)


def test_a_program_that_never_ends_is_an_error():
    launch(never_ends, torch.zeros(1), BOTH=True)
    with pytest.raises(EmulationError, match="never ends: group 0 waits for phase 0 of a barrier: 1 of 2"):
        launch(never_ends, torch.zeros(1), BOTH=False)


@gluon.jit
def product(a, b, result, WAIT: gl.constexpr, FENCE: gl.constexpr, WAIT_STORE: gl.constexpr):
    tiles = gl.allocate_shared_memory(a.dtype, [3, 64, 64], a.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    gl.warp_specialize([(_multiply, (a, b, result, tiles, bar, WAIT, FENCE, WAIT_STORE))], [], [])


@gluon.jit
def _multiply(a, b, result, tiles, bar, WAIT: gl.constexpr, FENCE: gl.constexpr, WAIT_STORE: gl.constexpr):
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    mbarrier.expect(bar, 2 * a.block_type.nbytes)
    fetch_block(a, [0, 0], bar, tiles.index(0))
    fetch_block(b, [0, 0], bar, tiles.index(1))
    if WAIT:
        mbarrier.wait(bar, 0)
    total = gl.zeros([64, 64], gl.float32, scores)
    total = warpgroup_mma(tiles.index(0), tiles.index(1).permute((1, 0)), total, use_acc=False, is_async=True)
    total = warpgroup_mma_wait(0, deps=[total])
    tiles.index(2).store(total.to(a.dtype))
    if FENCE:
        fence_async_shared()
    group_barrier()
    store_block(result, [0, 0], tiles.index(2))
    if WAIT_STORE:
        copies_read()


def test_a_product_of_copied_tiles():
    a, b, result = torch.randn(3, 64, 64, dtype=torch.bfloat16)
    given = [TensorDescriptor.from_tensor(x, [64, 64], LAYOUT) for x in (a, b, result)]
    launch(product, *given, WAIT=True, FENCE=True, WAIT_STORE=True)
    assert torch.equal(result, (a.float() @ b.float().T).bfloat16())
    for missing, words in (("WAIT", "writes NaN|without having waited"), ("FENCE", "a fence is missing"),
                           ("WAIT_STORE", "ends before its engines have read")):  # fmt: skip
        constants = {"WAIT": True, "FENCE": True, "WAIT_STORE": True} | {missing: False}
        with pytest.raises(EmulationError, match=words):
            launch(product, *given, **constants)


def changed_barrier(**names):
    """``mbarrier`` with other functions."""
    return {"mbarrier": type(language.mbarrier)(**(vars(language.mbarrier) | names))}


def waits_less(outstanding=0, deps=None):
    return language.warpgroup_mma_wait(outstanding + 1, deps=deps)


# Each of these is enough for a wrong result on a GPU, now and then.
@pytest.mark.parametrize(
    ("kernel", "change", "words"),
    [
        ("forward", {"copies_read": lambda: None}, "may still read|have read"),
        ("forward", {"group_barrier": lambda: None}, "one of its threads alone knows"),
        ("forward", {"fence_async_shared": lambda: None}, "a fence is missing"),
        ("forward", {"arrive": lambda *arguments: None}, "never ends"),
        ("forward", {"warpgroup_mma_wait": waits_less}, "before anybody waited for it"),
        ("forward", changed_barrier(wait=lambda *arguments, **options: None), "waited|nobody wrote|threads at"),
        ("forward", changed_barrier(arrive=lambda *arguments, **options: None), "never ends"),
        ("backward", {"copies_read": lambda: None}, "may still read|have read"),
        ("backward", {"group_barrier": lambda: None}, "one of its threads alone knows"),
        ("backward", {"fence_async_shared": lambda: None}, "a fence is missing"),
        ("backward", {"meet": lambda *arguments: None}, "waited|may still read|threads"),
        ("backward", {"warpgroup_mma_wait": waits_less}, "before anybody waited for it"),
        ("backward", changed_barrier(wait=lambda *arguments, **options: None), "waited|nobody wrote|threads at"),
    ],
)
def test_a_kernel_without_one_of_its_waits_is_found_out(kernel, change, words):
    pattern = DilatedPattern([700, 700], [1, 2])
    q, k, v, dout = inputs(700, 1, 1, 128)
    emulated = EmulatedKernel(turns=True)
    setattr(emulated, f"{kernel}_kernel", Emulated(getattr(launches, f"hopper_{kernel}_kernel"), change))
    with pytest.raises(EmulationError, match=words):
        attended(q, k, v, dout, pattern, emulated)


def test_the_hardware_swizzle_is_a_permutation():
    for columns, size in ((64, "bfloat16"), (128, "bfloat16"), (64, "float32")):
        dtype = getattr(language.gl, size)
        layout = gl.NVMMASharedLayout(128, dtype.primitive_bitwidth, 2)
        found = places(layout, (2, 64, columns), dtype)
        assert sorted(found.flatten().tolist()) == list(range(2 * 64 * columns))
    assert places(LAYOUT, (64, 64), language.gl.bfloat16)[1, :9].tolist() == [*range(72, 80), 64]


def test_integers_are_those_of_c():
    seven, three = Value(-7, int32), Value(3, int32)
    assert (int(seven // three), int(seven % three)) == (-2, -1)
    block = Value(torch.tensor([-7, 7]), int32)
    assert ((block // 2).data.tolist(), (block % 2).data.tolist()) == ([-3, 3], [-1, 1])
    assert (seven * 0.5).dtype is float32
    with pytest.raises(EmulationError, match="overflows"):
        Value(2**30, int32) * 2
    with pytest.raises(EmulationError, match="do not meet"):
        block + block[:, None]
