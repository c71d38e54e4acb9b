from functools import partial

import pytest
import torch
from torch.nn import functional as F

from longnet_dist.engine import rows
from longnet_dist.engine.rows import RowParts
from longnet_dist.model.longnet import LongNet
from longnet_dist.ops.compiled import _compiled
from longnet_dist.ops.norm_gradients.choice import gives_delta, norm_gradients_of
from longnet_dist.ops.norm_gradients.reference import norm_gradients
from tests.engine.test_block_run import model_config

pytest.importorskip("triton")
from longnet_dist.ops.norm_gradients import triton as kernels

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
USES = {"alone": (False, False), "residual": (True, False), "all": (True, True)}


def inputs(count, length, device="cpu", dtype=torch.float32):
    """``dy, x, residual_grad``; the mean of a row of ``x`` is not small against its deviation."""
    generator = torch.Generator().manual_seed(0)
    dy, x, residual_grad = torch.randn(3, count, length, generator=generator)
    return [tensor.to(device, dtype) for tensor in (dy, x + 2, residual_grad)]


def exact(dy, x, residual_grad):
    """``dx``, the sum of its rows, and that of those of ``residual_grad``, by autograd in float64."""
    x = x.double().requires_grad_()
    y = F.layer_norm(x, x.shape[-1:], eps=1e-5)
    (dx,) = torch.autograd.grad(y, x, dy.double())
    if residual_grad is None:
        return dx, dx.sum(0), None
    return dx + residual_grad.double(), (dx + residual_grad.double()).sum(0), residual_grad.double().sum(0)


def used(given, use):
    """The inputs of a use, and whether it sums."""
    dy, x, residual_grad = given
    return (dy, x, residual_grad if USES[use][0] else None), USES[use][1]


# One piece, three, five; whole tiles and ragged ones; rows for all programs and for one.
@on_a_cpu
@pytest.mark.parametrize(("count", "length"), [(64, 64), (5, 192), (1, 256), (41, 320), (7, 1536), (3, 4096)])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("function", [kernels.norm_gradients, norm_gradients], ids=["kernel", "torch"])
def test_agrees_with_float64(function, use, count, length):
    given, summed = used(inputs(count, length), use)
    dx = torch.full((count, length), float("nan"))
    sums, normed = function(*given, 1e-5, summed, use != "residual", dx, None)
    expected, *expected_sums = exact(*given)
    if use != "residual":
        wanted = F.layer_norm(given[1].double(), (length,), eps=1e-5)
        torch.testing.assert_close(normed.double(), wanted, rtol=2e-5, atol=4e-6)
    torch.testing.assert_close(dx.double(), expected, rtol=2e-5, atol=4e-6)
    assert len(sums) == 2 * summed
    for actual, wanted in zip(sums, expected_sums, strict=False):
        torch.testing.assert_close(actual.double(), wanted, rtol=2e-5, atol=2e-5)


@on_a_cpu
@pytest.mark.parametrize("function", [kernels.norm_gradients, norm_gradients], ids=["kernel", "torch"])
def test_adds_in_place(function):
    dy, x, residual_grad = inputs(9, 192)
    expected, *_ = exact(dy, x, residual_grad)
    function(dy, x, residual_grad, 1e-5, False, False, residual_grad, None)
    torch.testing.assert_close(residual_grad.double(), expected, rtol=2e-5, atol=4e-6)


# Heads of one number and of a whole piece; ragged tiles; rounded gradients, whose products are wanted.
@on_a_cpu
@pytest.mark.parametrize(("count", "length", "heads"), [(64, 64, 64), (5, 192, 3), (41, 320, 20), (7, 1536, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("function", [kernels.norm_gradients, norm_gradients], ids=["kernel", "torch"])
def test_gives_delta_of_heads(function, dtype, count, length, heads):
    dy, x, _ = inputs(count, length, dtype=dtype)
    dx, delta = torch.empty_like(x), torch.full((count, heads), float("nan"))
    function(dy, x, None, 1e-5, False, False, dx, delta)
    torch.testing.assert_close(dx.double(), exact(dy, x, None)[0], rtol=2e-3, atol=2e-3)
    expected = (dx.double() * x.double()).unflatten(1, (heads, -1)).sum(-1)
    torch.testing.assert_close(delta.double(), expected, rtol=1e-5, atol=1e-5)


@on_a_cpu
def test_equal_numbers_have_a_finite_gradient():
    x, dx = torch.full((2, 64), 3.0), torch.empty(2, 64)
    kernels.norm_gradients(torch.ones_like(x), x, None, 1e-5, False, False, dx, None)
    assert dx.abs().max() < 1e-3


def test_lengths_that_fit():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert all(map(kernels.fits, (512, 768, 1024, 1536, 2048, 2560, 4096, 5120)))
    assert not any(map(kernels.fits, (16, 1000, 1025, 12288)))
    assert norm_gradients_of(cpu, torch.float32, 768) is norm_gradients
    assert norm_gradients_of(cuda, torch.float64, 768) is norm_gradients
    assert norm_gradients_of(cuda, torch.bfloat16, 1000) is norm_gradients
    assert norm_gradients_of(cuda, torch.bfloat16, 768) is kernels.norm_gradients
    assert all(kernels.fits_heads(*sizes) for sizes in ((768, 12), (768, 6), (2048, 32), (4096, 32)))
    assert not any(kernels.fits_heads(*sizes) for sizes in ((1536, 16), (2560, 32), (1000, 10), (768, 2)))
    assert gives_delta(cuda, torch.bfloat16, 768, 12)
    assert not gives_delta(cuda, torch.bfloat16, 2560, 32)
    assert not gives_delta(cpu, torch.float32, 768, 12)


@on_a_cpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_block_computes_the_same_with_it(monkeypatch, compile):
    torch.manual_seed(0)
    block = LongNet(model_config(dim=64)).blocks[0]
    weights, heads = dict(block.named_parameters()), (4, 2, 2)
    x, dz, dx = torch.randn(3, 20, 64)
    out, dq, dk, dv = (torch.randn(20, number, 16) for number in (4, *heads))

    def results(*execution):
        parts, total = RowParts(weights, None, 16, 1e-5, *execution), dx.clone()
        _, moments = parts.output(x, out)
        first, dout, delta, gradients = parts.output_gradients(x, out, dz, moments)
        if delta is not None:
            torch.testing.assert_close(delta, (dout * out).sum(-1), rtol=1e-4, atol=1e-5)
            deltas.append(delta)
        return [first, dout, *gradients, *parts.add_projection_gradients(x, (dq, dk, dv), total), total]

    calls, deltas = [], []
    expected = results()

    def counted(*inputs):
        calls.append(inputs)
        return kernels.norm_gradients(*inputs)

    monkeypatch.setattr(rows, "gives_delta", lambda *_: True)
    monkeypatch.setattr(rows, "norm_gradients_of", lambda *_: kernels.norm_gradients if compile else counted)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    _compiled.cache_clear()
    actual = results(8, compile)
    _compiled.cache_clear()
    assert len(calls) == (0 if compile else 9)
    assert len(deltas) == 1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("length", [768, 1536, 2048, 2560, 4096])
@pytest.mark.parametrize("use", USES)
def test_agrees_with_float64_on_a_gpu(use, length):
    given, summed = used(inputs(5001, length, "cuda", torch.bfloat16), use)
    function, dx = norm_gradients_of(torch.device("cuda"), torch.bfloat16, length), torch.empty_like(given[0])
    assert function is kernels.norm_gradients
    sums, normed = function(*given, 1e-5, summed, True, dx, None)
    results = dx, *sums
    wanted = F.layer_norm(given[1].double(), (length,), eps=1e-5)
    assert (normed - wanted).norm() < 0.003 * wanted.norm()
    for actual, expected in zip(results, exact(*given), strict=False):
        assert (actual - expected).norm() < 0.003 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("length", "heads"), [(768, 12), (2048, 16), (4096, 64)])
def test_gives_delta_of_heads_on_a_gpu(length, heads):
    dy, x, _ = inputs(5001, length, "cuda", torch.bfloat16)
    dx, delta = torch.empty_like(x), torch.empty(5001, heads, device="cuda")
    kernels.norm_gradients(dy, x, None, 1e-5, False, False, dx, delta)
    expected = (dx.double() * x.double()).unflatten(1, (heads, -1)).sum(-1)
    torch.testing.assert_close(delta.double(), expected, rtol=1e-4, atol=1e-4)
