from functools import partial

import pytest
import torch

from longnet_dist import DilatedPattern
from longnet_dist.attention.positions import Positions, RotaryTable, rotate
from longnet_dist.engine import rows
from longnet_dist.engine.rows import RowParts
from longnet_dist.model.longnet import LongNet
from longnet_dist.ops.compiled import _compiled
from longnet_dist.ops.join_gradients.choice import join_gradients_of
from longnet_dist.ops.join_gradients.reference import join_gradients
from tests.engine.test_block_run import model_config

pytest.importorskip("triton")
from longnet_dist.ops.join_gradients import triton as kernels

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
# Rows, heads, key/value heads, head dim: whole tiles, ragged, one row, grouped heads, heads that are no power of two.
SHAPES = [(64, 2, 2, 64), (37, 4, 2, 32), (1, 2, 2, 64), (9, 3, 1, 64), (6, 4, 4, 80)]
POSITIONS = [None, Positions(), Positions(xpos_base=512)]


def gradients(count, heads, kv_heads, head_dim, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    dq, dk, dv = (torch.randn(count, number, head_dim, generator=generator) for number in (heads, kv_heads, kv_heads))
    return dq.to(device), dk.to(device, dtype), dv.to(device, dtype)


def table_of(positions, count, head_dim, device="cpu"):
    if positions is None:
        return None
    return positions.table(DilatedPattern([64], [1]), 3, count, 10**5, head_dim, torch.float32, torch.device(device))


def exact(dq, dk, dv, table):
    """The gradients of what was rotated, by autograd in float64."""
    q, k = (torch.zeros_like(gradient, dtype=torch.float64, requires_grad=True) for gradient in (dq, dk))
    if table is not None:
        products = zip(rotate(q, k, RotaryTable(*(table.double() for table in table))), (dq, dk), strict=True)
        dq, dk = torch.autograd.grad(sum((x * dx.double()).sum() for x, dx in products), (q, k))
    joined = torch.cat([gradient.double().flatten(1) for gradient in (dq, dk, dv)], 1)
    return joined, joined.sum(0)


@on_a_cpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("positions", POSITIONS, ids=["none", "rope", "xpos"])
@pytest.mark.parametrize("function", [kernels.join_gradients, join_gradients], ids=["kernel", "torch"])
def test_agrees_with_float64(function, positions, shape):
    given, table = gradients(*shape), table_of(positions, shape[0], shape[-1])
    for actual, expected in zip(function(*given, table, torch.float32), exact(*given, table), strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@on_a_cpu
def test_rounds_once():
    dtype = torch.float16  # Triton's interpreter cuts bfloat16 off
    dq, dk, dv = gradients(5, 2, 2, 64, dtype=dtype)
    joined, sums = kernels.join_gradients(dq, dk, dv, None, dtype)
    assert torch.equal(joined, torch.cat([gradient.to(dtype).flatten(1) for gradient in (dq, dk, dv)], 1))
    torch.testing.assert_close(sums, torch.cat([gradient.float().flatten(1) for gradient in (dq, dk, dv)], 1).sum(0))


def test_heads_that_fit():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert all(kernels.fits(*heads) for heads in ((64, 12, 12), (64, 12, 4), (96, 16, 16), (80, 32, 32), (128, 32, 8)))
    assert not any(kernels.fits(*heads) for heads in ((33, 2, 2), (10, 3, 1), (128, 64, 64)))
    assert join_gradients_of(cpu, torch.float32, 64, 12, 12) is join_gradients
    assert join_gradients_of(cuda, torch.float64, 64, 12, 12) is join_gradients
    assert join_gradients_of(cuda, torch.bfloat16, 10, 3, 1) is join_gradients
    assert join_gradients_of(cuda, torch.bfloat16, 64, 12, 12) is kernels.join_gradients


@on_a_cpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_block_computes_the_same_with_it(monkeypatch, compile, qk_norm):
    torch.manual_seed(0)
    block = LongNet(model_config(qk_norm=qk_norm)).blocks[0]
    weights, head_dim = dict(block.named_parameters()), block.self_attn.head_dim
    width, heads = block.self_attn.q_proj.weight.shape[1], len(block.self_attn.q_proj.bias) // head_dim
    kv_heads = len(block.self_attn.k_proj.bias) // head_dim
    given = gradients(20, heads, kv_heads, head_dim)
    table, x, dx = table_of(Positions(), 20, head_dim), torch.randn(20, width), torch.randn(20, width)

    def results(*execution):
        total = dx.clone()
        return [*RowParts(weights, table, head_dim, 1e-5, *execution).add_projection_gradients(x, given, total), total]

    expected = results()
    calls = []

    def counted(*inputs):
        calls.append(inputs)
        return kernels.join_gradients(*inputs)

    monkeypatch.setattr(rows, "join_gradients_of", lambda *_: kernels.join_gradients if compile else counted)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    _compiled.cache_clear()
    actual = results(8, compile)
    _compiled.cache_clear()
    assert len(calls) == (0 if compile else 3)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("heads", [(12, 12, 64), (12, 4, 64), (32, 32, 64), (16, 16, 96), (32, 32, 80)])
@pytest.mark.parametrize("positions", POSITIONS, ids=["none", "rope", "xpos"])
def test_agrees_with_float64_on_a_gpu(positions, heads):
    given = gradients(5001, *heads, device="cuda", dtype=torch.bfloat16)
    table = table_of(positions, 5001, heads[-1], "cuda")
    function = join_gradients_of(torch.device("cuda"), torch.bfloat16, heads[-1], *heads[:2])
    assert function is kernels.join_gradients
    for actual, expected in zip(function(*given, table, torch.bfloat16), exact(*given, table), strict=True):
        assert (actual - expected).norm() < 0.003 * expected.norm()
