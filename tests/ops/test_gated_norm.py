from functools import partial

import pytest
import torch
from torch.nn import functional as F

from longnet_dist.engine import rows as engine_rows
from longnet_dist.engine.rows import RowParts
from longnet_dist.model.longnet import LongNet
from longnet_dist.ops.compiled import _compiled
from longnet_dist.ops.gated_norm.choice import PLAIN, gated_norm_of
from longnet_dist.ops.gelu_norm.choice import GeluNorm
from tests.engine.test_block_run import model_config

pytest.importorskip("triton")
from longnet_dist.ops.gated_norm import triton as kernels

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
KERNELS = GeluNorm(kernels.gated_norm, kernels.gated_norm_gradients)


def exact(dy, h, weight, bias):
    """``y`` with weights, then ``y`` without them, ``dh`` and its sum, in float64 by autograd."""
    h = h.double().requires_grad_()
    gate, up = h.chunk(2, -1)
    inner = gate * torch.sigmoid(gate) * up
    weighted = F.layer_norm(inner, up.shape[-1:], weight.double(), bias.double(), 1e-5)
    y = F.layer_norm(inner, up.shape[-1:], None, None, 1e-5)
    (dh,) = torch.autograd.grad(y, h, dy.double())
    return weighted, y, dh, dh.sum(0)


def inputs(rows, length, scale=2.0, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, length), (rows, 2 * length), (length,), (length,)
    dy, h, weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return dy, scale * h, weight, bias


def computed(functions, dy, h, weight, bias):
    return functions.forward(h, weight, bias, 1e-5), *functions.gradients(dy.clone(), h.clone(), 1e-5)


# A power of two, three pieces, many; values of which silu is 0 or the value itself; rows for all programs but the last.
@on_a_cpu
@pytest.mark.parametrize(("rows", "length", "scale"), [(1, 64, 2), (5, 24, 2), (13, 96, 2), (3, 3072, 2), (6, 48, 40)])
@pytest.mark.parametrize("functions", [KERNELS, PLAIN], ids=["kernels", "torch"])
def test_agrees_with_float64(functions, rows, length, scale):
    given = inputs(rows, length, scale)
    for actual, expected in zip(computed(functions, *given), exact(*given), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=4e-5, atol=1e-5 * scale)


@on_a_cpu
def test_the_kernel_allocates_nothing_and_equal_rows_have_a_finite_gradient():
    h, dy = torch.full((2, 64), 3.0), torch.ones(2, 32)
    y, dh, _ = kernels.gated_norm_gradients(dy, h, 1e-5)
    assert (y.data_ptr(), dh.data_ptr()) == (dy.data_ptr(), h.data_ptr())
    assert y.abs().max() < 1e-3
    assert dh.abs().max() < 1e-3


def test_lengths_that_fit():
    assert all(map(kernels.fits, (2048, 3072, 8192, 12288, 14336)))
    assert not any(map(kernels.fits, (16384, 12289)))
    assert gated_norm_of(torch.device("cpu"), torch.float32, 3072) is PLAIN
    assert gated_norm_of(torch.device("cuda"), torch.float64, 3072) is PLAIN
    assert gated_norm_of(torch.device("cuda"), torch.bfloat16, 8191) is PLAIN
    assert gated_norm_of(torch.device("cuda"), torch.bfloat16, 12288) == KERNELS


@on_a_cpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_block_computes_the_same_with_them(monkeypatch, compile):
    torch.manual_seed(0)
    block = LongNet(model_config(ffn="gated")).blocks[0]
    with torch.no_grad():
        for vector in (parameter for parameter in block.parameters() if parameter.dim() == 1):
            vector += torch.randn_like(vector) / 4
    x, out, dz = torch.randn(20, 16), torch.randn(20, 4, 4), torch.randn(20, 16)

    def results(parts):
        z, moments = parts.output(x, out)
        dx, dout, _, gradients = parts.output_gradients(x, out, dz, moments)
        return [z, dx, dout, *gradients]

    expected = results(RowParts(dict(block.named_parameters()), None, 4, 1e-5))
    lengths = []
    monkeypatch.setattr(engine_rows, "gated_norm_of", lambda *given: lengths.append(given[2]) or KERNELS)
    _compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    actual = results(RowParts(dict(block.named_parameters()), None, 4, 1e-5, 10, compile))
    _compiled.cache_clear()
    assert lengths == [24]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("length", [3072, 8192, 12288])
def test_agrees_with_float64_on_a_gpu(length):
    given = inputs(500, length, device="cuda", dtype=torch.bfloat16)
    functions = gated_norm_of(torch.device("cuda"), torch.bfloat16, length)
    assert functions == KERNELS
    for actual, expected in zip(computed(functions, *given), exact(*given), strict=True):
        assert (actual - expected).norm() < 0.004 * expected.norm()
