from functools import partial

import pytest
import torch

from longnet_dist.engine import rows as engine_rows
from longnet_dist.ops.compiled import _compiled
from longnet_dist.ops.gated_norm.choice import PLAIN, gated_norm_of
from longnet_dist.ops.gelu_norm.choice import GeluNorm
from tests.ops.middles import Row, computed, exact, inputs

pytest.importorskip("triton")
from longnet_dist.ops.gated_norm import triton as kernels

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
KERNELS = GeluNorm(kernels.gated_norm, kernels.gated_norm_gradients)


def gated(h):
    gate, up = h.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


# A power of two, three pieces, many; values of which silu is 0 or the value itself; rows for all programs but the last.
@on_a_cpu
@pytest.mark.parametrize(("rows", "length", "scale"), [(1, 64, 2), (5, 24, 2), (13, 96, 2), (3, 3072, 2), (6, 48, 40)])
@pytest.mark.parametrize("functions", [KERNELS, PLAIN], ids=["kernels", "torch"])
def test_agrees_with_float64(functions, rows, length, scale):
    given = inputs(rows, length, scale, width=2)
    for actual, expected in zip(computed(functions, *given), exact(gated, *given), strict=True):
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
    row = Row(ffn="gated")
    expected = row.results()
    lengths = []
    monkeypatch.setattr(engine_rows, "gated_norm_of", lambda *given: lengths.append(given[2]) or KERNELS)
    _compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    actual = row.results(10, compile)
    _compiled.cache_clear()
    assert lengths == [24]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("length", [3072, 8192, 12288])
def test_agrees_with_float64_on_a_gpu(length):
    given = inputs(500, length, device="cuda", dtype=torch.bfloat16, width=2)
    functions = gated_norm_of(torch.device("cuda"), torch.bfloat16, length)
    assert functions == KERNELS
    for actual, expected in zip(computed(functions, *given), exact(gated, *given), strict=True):
        assert (actual - expected).norm() < 0.004 * expected.norm()
