import pytest
import torch
from torch import nn

from longnet_dist.ops.normed_linear.choice import normed_linear_of
from longnet_dist.ops.normed_linear.reference import normed_linear

pytest.importorskip("triton")
from longnet_dist.ops.normed_linear import triton as kernels

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
# Rows, inputs, outputs of each layer: one row, several pieces, ragged pieces and columns, three layers.
SHAPES = [(1, 32, [48]), (5, 1100, [24]), (17, 700, [40, 8, 24]), (3, 16, [16, 32, 32])]
WAYS = [{}, {"gelu": True}, {"residual": True}]


def problem(rows, depth, widths, residual=False, device="cpu", dtype=torch.float32):
    """Arguments, with a norm and biases that are none of the initial ones, and rows far from 0."""
    torch.manual_seed(0)
    norm, layers = nn.LayerNorm(depth), [nn.Linear(depth, width) for width in widths]
    for parameter in (norm.weight, norm.bias):
        nn.init.normal_(parameter)
    x, summand = 3 + torch.randn(rows, depth), torch.randn(rows, sum(widths))
    return (
        x.to(device, dtype),
        norm.to(device, dtype),
        [layer.to(device, dtype) for layer in layers],
        summand.to(device, dtype) if residual else None,
    )


def exact(x, norm, layers, residual, gelu):
    """The result in float64; it changes the modules."""
    return normed_linear(
        x.double(), norm.double(), [layer.double() for layer in layers],
        None if residual is None else residual.double(), gelu,
    )  # fmt: skip


@on_a_cpu
@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("function", [kernels.normed_linear, normed_linear], ids=["kernel", "torch"])
def test_agrees_with_float64(function, way, shape):
    given, gelu = problem(*shape, way.get("residual", False)), way.get("gelu", False)
    actual = function(*given, gelu)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact(*given, gelu), rtol=1e-5, atol=2e-5)


def test_few_rows_on_a_gpu_get_the_kernel():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert normed_linear_of(cpu, torch.float32, 1) is normed_linear
    assert normed_linear_of(cuda, torch.float64, 1) is normed_linear
    assert normed_linear_of(cuda, torch.bfloat16, 33) is normed_linear
    assert normed_linear_of(cuda, torch.bfloat16, 32) is kernels.normed_linear


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 768, [768, 768, 768]), (32, 3072, [768]), (20, 700, [512, 128, 128])], ids=str)
def test_agrees_with_float64_on_a_gpu(shape, dtype, way):
    given, gelu = problem(*shape, way.get("residual", False), "cuda", dtype), way.get("gelu", False)
    actual = kernels.normed_linear(*given, gelu)
    expected = exact(*given, gelu)
    assert (actual - expected).norm() < (0.006 if dtype == torch.bfloat16 else 1e-5) * expected.norm()
