from functools import partial

import pytest
import torch
from torch.nn import functional as F

from longnet_dist.ops.compiled import _compiled
from longnet_dist.ops.gelu_norm import choice as plain
from longnet_dist.ops.gelu_norm.choice import PLAIN, GeluNorm
from tests.ops.middles import Row, computed, exact, inputs

pytest.importorskip("triton")
from longnet_dist.ops.gelu_norm import triton as kernels

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
KERNELS = GeluNorm(kernels.gelu_norm, kernels.gelu_norm_gradients)


# A power of two, three pieces, many; values of which gelu is 0 or the value itself; rows for all programs but the last.
@on_a_cpu
@pytest.mark.parametrize(("rows", "length", "scale"), [(1, 64, 2), (5, 24, 2), (13, 96, 2), (3, 2048, 2), (6, 48, 40)])
@pytest.mark.parametrize("functions", [KERNELS, PLAIN], ids=["kernels", "torch"])
def test_agrees_with_float64(functions, rows, length, scale):
    given = inputs(rows, length, scale)
    for actual, expected in zip(computed(functions, *given), exact(F.gelu, *given), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=4e-6)


@on_a_cpu
def test_equal_rows_have_a_finite_gradient():
    h = torch.full((2, 32), 3.0)
    dy = torch.ones_like(h)
    y, dh, _ = kernels.gelu_norm_gradients(dy, h, 1e-5)
    assert (y.data_ptr(), dh.data_ptr()) == (h.data_ptr(), dy.data_ptr())  # nothing is allocated
    assert y.abs().max() < 1e-3
    assert dh.abs().max() < 1e-3


def test_lengths_that_fit():
    assert all(map(kernels.fits, (3072, 4096, 8192, 10240)))
    assert not any(map(kernels.fits, (kernels.LONGEST + 1024, 8191, 3 * 65536)))
    assert GeluNorm.of(torch.device("cpu"), torch.float32, 3072) is PLAIN
    assert GeluNorm.of(torch.device("cuda"), torch.float64, 3072) is PLAIN
    assert GeluNorm.of(torch.device("cuda"), torch.bfloat16, 8191) is PLAIN
    assert GeluNorm.of(torch.device("cuda"), torch.bfloat16, 3072) == KERNELS


@on_a_cpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_block_computes_the_same_with_them(monkeypatch, compile):
    row = Row()
    expected = row.results()
    calls = []

    def gradients(*given):
        calls.append(given)
        return kernels.gelu_norm_gradients(*given)

    counted = GeluNorm(kernels.gelu_norm, kernels.gelu_norm_gradients if compile else gradients)
    monkeypatch.setattr(plain.GeluNorm, "of", lambda *_: counted)
    _compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    actual = row.results(10, compile)
    _compiled.cache_clear()
    assert len(calls) == (0 if compile else 2)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("length", [3072, 8192])
def test_agrees_with_float64_on_a_gpu(length):
    given = inputs(500, length, device="cuda", dtype=torch.bfloat16)
    functions = GeluNorm.of(torch.device("cuda"), torch.bfloat16, length)
    assert functions == KERNELS
    for actual, expected in zip(computed(functions, *given), exact(F.gelu, *given), strict=True):
        assert (actual - expected).norm() < 0.004 * expected.norm()
