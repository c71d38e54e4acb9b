import itertools

import pytest
import torch
from torch.nn import functional as F

from longnet_dist import DilatedPattern
from longnet_dist.attention.positions import Positions, rotate

pytest.importorskip("triton")
from longnet_dist.attention.kernels.triton import decode
from longnet_dist.attention.kernels.triton.keep import rotate_and_keep

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")


def problem(texts, heads, group, slots, dim, device="cpu", dtype=torch.float32):
    """Queries, records with one slot more than is seen, and random slots that are; one head sees nothing."""
    generator = torch.Generator().manual_seed(slots)
    q = torch.randn(texts, heads, group, dim, generator=generator).to(device, dtype)
    records = torch.randn(2, texts, heads, slots + 1, dim, generator=generator).to(device, dtype)
    seen = (torch.rand(texts, heads, slots, generator=generator) < 0.4).to(device)
    seen[0, 0] = False
    seen[-1, -1] = True
    nothing = ~seen.any(-1, keepdim=True)
    seen[:, :, :1] |= nothing
    # As in a cache, what is not seen may be anything.
    records[:, :, :, :-1].masked_fill_(~seen.unsqueeze(-1), torch.nan)
    keys, values = records[:, :, :, :-1]
    return q, keys, values, seen, nothing


def attended(q, keys, values, seen, nothing):
    blocks = decode.visible_blocks(seen, decode.block_size(*q.shape[2:]))
    return decode.attend_to_slots(q, keys, values, seen, nothing, blocks)


def exact(q, keys, values, seen, nothing):
    keys, values = (x.masked_fill(~seen.unsqueeze(-1), 0) for x in (keys, values))
    parts = (x.double() for x in (q, keys, values))
    return F.scaled_dot_product_attention(*parts, attn_mask=seen.unsqueeze(2)).masked_fill(nothing.unsqueeze(2), 0)


# Fewer slots than a block, several parts of unequal lengths, a dim that is no power of two, groups of heads.
SHAPES = [(1, 2, 1, 7, 16), (2, 1, 1, 300, 16), (1, 2, 3, 200, 24), (3, 2, 2, 65, 32), (2, 1, 5, 130, 24)]


@on_a_cpu
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape):
    given = problem(*shape)
    torch.testing.assert_close(attended(*given).double(), exact(*given), rtol=1e-5, atol=1e-6)


@on_a_cpu
@pytest.mark.parametrize("group", [1, 3])
def test_many_blocks_are_shared_by_few_programs(monkeypatch, group):
    for name, value in {"BLOCK": 16, "MOST_BLOCKS": 4, "PROGRAMS": 1}.items():
        monkeypatch.setattr(decode, name, value)
    q, keys, values, seen, nothing = problem(2, 2, group, 411, 16, dtype=torch.float16)
    seen &= torch.arange(411) // 16 % 5 != 2  # blocks that nobody sees
    given = q, keys, values, seen, nothing
    torch.testing.assert_close(attended(*given).double(), exact(*given), rtol=2e-3, atol=1e-3)


def test_visible_blocks():
    seen = torch.zeros(1, 2, 21, dtype=torch.bool)
    seen[0, 0, [5, 20]] = True
    seen[0, 1, 11:13] = True
    blocks = decode.visible_blocks(seen, 4)
    assert blocks.counts.tolist() == [[2, 2]]
    assert blocks.numbers.tolist() == [[[1, 5, 0, 2, 3, 4], [2, 3, 0, 1, 4, 5]]]


def test_blocks_shrink_where_channels_are_many_and_make_no_matmul():
    assert [decode.block_size(1, dim) for dim in (64, 128, 256, 1024)] == [64, 64, 32, 16]
    assert [decode.block_size(group, 256) for group in (2, 3)] == [decode.BLOCK] * 2


def kept(function, q, k, v, records, slots, table):
    records = records.clone()
    return function(q, k, v, records, slots, table), records


def plainly(q, k, v, records, slots, table):
    """Rotates and keeps as the readable path does."""
    if table is not None:
        q, k = (rows.unsqueeze(1) for rows in rotate(q[:, 0], k[:, 0], table))
    for branch in slots:
        for text, head in itertools.product(range(q.shape[0]), range(k.shape[2])):
            records[:, text, head, branch[text, head]] = torch.stack([k, v])[:, text, 0, head]
    return q


def step(texts, kv_heads, group, dim, positions, device="cpu", dtype=torch.float32):
    """Queries, keys and values as parts of one tensor, slots of which some are shared, and rotations."""
    generator, heads = torch.Generator().manual_seed(dim), group * kv_heads
    joined = torch.randn(texts, 1, heads + 2 * kv_heads, dim, generator=generator).to(device, dtype)
    records = torch.randn(2, texts, kv_heads, 9, dim, generator=generator).to(device, dtype)
    slots = torch.randint(9, (3, texts, kv_heads), generator=generator)
    slots[1, 0] = slots[0, 0]
    table = None
    if positions is not None:
        place = 10**6, texts, 2 * 10**6, dim, torch.float32, torch.device(device)
        table = positions.table(DilatedPattern([64], [1]), *place)
    return *joined.split([heads, kv_heads, kv_heads], 2), records, slots.to(device), table


POSITIONS = [None, Positions(), Positions(xpos_base=512)]


@on_a_cpu
@pytest.mark.parametrize("shape", [(1, 2, 1, 64), (3, 2, 3, 24), (2, 1, 4, 16)])
@pytest.mark.parametrize("positions", POSITIONS, ids=["none", "rope", "xpos"])
def test_rotates_and_keeps_as_the_readable_path(positions, shape):
    given = step(*shape, positions)
    for actual, expected in zip(kept(rotate_and_keep, *given), kept(plainly, *given), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@on_a_cpu
def test_rounds_once():
    """In float16, since Triton's interpreter cuts bfloat16 off; a head dim that is odd, without positions."""
    given = step(2, 2, 2, 64, POSITIONS[1], dtype=torch.float16)
    for actual, expected in zip(kept(rotate_and_keep, *given), kept(plainly, *given), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)
    given = step(2, 2, 2, 7, None)
    for actual, expected in zip(kept(rotate_and_keep, *given), kept(plainly, *given), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "shape", [(1, 12, 1, 11607, 64), (64, 4, 3, 5000, 64), (2, 8, 4, 3000, 128), (2, 2, 9, 99, 80)]
)
def test_agrees_with_float64_on_a_gpu(shape):
    given = problem(*shape, device="cuda", dtype=torch.bfloat16)
    out, expected = attended(*given), exact(*given)
    assert (out - expected).norm() < 0.004 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("positions", POSITIONS, ids=["none", "rope", "xpos"])
@pytest.mark.parametrize("shape", [(1, 12, 1, 64), (64, 4, 3, 64), (3, 2, 2, 80)])
def test_rotates_and_keeps_on_a_gpu(shape, positions):
    given = step(*shape, positions, "cuda", torch.bfloat16)
    for actual, expected in zip(kept(rotate_and_keep, *given), kept(plainly, *given), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=1e-3)
