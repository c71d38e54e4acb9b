from functools import partial

import pytest
import torch
from torch.nn import functional as F

import longnet_dist.model.loss as loss_module
from longnet_dist.errors import ConfigError
from longnet_dist.model.loss import IGNORE_INDEX, linear_cross_entropy
from longnet_dist.ops.compiled import _compiled


def problem(dtype, rows=37, vocab=11, dim=8, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, dim, generator=generator).to(device, dtype).requires_grad_() for n in (rows, vocab))
    labels = torch.randint(vocab, (rows,), generator=generator).to(device)
    labels[::5] = IGNORE_INDEX
    return x, weight, labels


def dense(x, weight, labels):
    return F.cross_entropy(x @ weight.T, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def test_a_compiled_loss_is_the_same(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    _compiled.cache_clear()
    x, weight, labels = problem(torch.float64)
    for compile in (False, True):
        loss = linear_cross_entropy(x, weight, labels, 10, compile)
        torch.testing.assert_close(loss, dense(x, weight, labels))
        gradients = torch.autograd.grad(loss, (x, weight))
        torch.testing.assert_close(gradients, torch.autograd.grad(dense(x, weight, labels), (x, weight)))
    _compiled.cache_clear()


@pytest.mark.parametrize("chunk", [1, 10, 37, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("alignment", [1, 8])
def test_loss_and_gradients_are_the_dense_ones_for_every_chunk(chunk, dtype, tolerance, alignment, monkeypatch):
    monkeypatch.setattr(loss_module, "_alignment", lambda device: alignment)
    x, weight, labels = problem(dtype)
    expected, loss = dense(x, weight, labels), linear_cross_entropy(x, weight, labels, chunk)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    wanted = torch.autograd.grad(expected / 7, (x, weight))
    for actual, exact in zip(torch.autograd.grad(loss / 7, (x, weight)), wanted, strict=True):
        torch.testing.assert_close(actual, exact, rtol=tolerance, atol=tolerance)


def test_many_bf16_chunks_lose_no_precision():
    """Summed in bf16, the gradient of the weight would stop growing after some hundred chunks."""
    x, weight, labels = problem(torch.bfloat16, rows=2000)
    exact = torch.autograd.grad(dense(x.double(), weight.double(), labels), (x, weight))
    loss = linear_cross_entropy(x, weight, labels, 2)
    assert loss.dtype == torch.float32
    for actual, wanted in zip(torch.autograd.grad(loss, (x, weight)), exact, strict=True):
        assert (actual - wanted).norm() < 5e-3 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.filterwarnings("ignore:.?torch.jit.script_method.? is deprecated:DeprecationWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocab", [1003, 1024])
def test_agrees_with_float64_on_a_gpu(vocab):
    x, weight, labels = problem(torch.bfloat16, rows=3000, vocab=vocab, dim=64, device="cuda")
    expected = dense(x.double(), weight.double(), labels)
    exact = torch.autograd.grad(expected, (x, weight))
    rounded = torch.autograd.grad(dense(x, weight, labels), (x, weight))
    for compile in (False, True):
        loss = linear_cross_entropy(x, weight, labels, 1024, compile)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)
        for actual, of_torch, wanted in zip(torch.autograd.grad(loss, (x, weight)), rounded, exact, strict=True):
            assert (actual - wanted).norm() < 1.1 * (of_torch - wanted).norm() < 1e-2 * wanted.norm()


def test_rows_without_label_count_nothing():
    x, weight, labels = problem(torch.float64)
    loss = linear_cross_entropy(x, weight, torch.full_like(labels, IGNORE_INDEX), 10)
    assert loss.item() == 0
    assert [g.abs().max().item() for g in torch.autograd.grad(loss, (x, weight))] == [0, 0]


def test_logits_never_exist_whole():
    """The largest tensor that forward and backward make has ``chunk`` rows of logits."""
    x, weight, labels = problem(torch.float32, rows=640, vocab=1000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        linear_cross_entropy(x, weight, labels, 16).backward()
    assert largest == 16 * 1000


def test_each_product_is_made_once():
    """With a graph three products a chunk, without one; none in backward."""
    x, weight, labels = problem(torch.float32)
    products = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal products
            products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return func(*args, **(kwargs or {}))

    with Count():
        loss = linear_cross_entropy(x, weight, labels, 10)
        assert products == 3 * 4
        loss.backward()
        assert products == 3 * 4
        with torch.no_grad():
            linear_cross_entropy(x, weight, labels, 10)
        assert products == 4 * 4


def test_a_label_that_is_no_output_is_an_error(monkeypatch):
    monkeypatch.setattr(loss_module, "_alignment", lambda device: 8)
    x, weight, labels = problem(torch.float32)
    labels[3] = len(weight)  # a row that stands there for the alignment alone
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(x, weight, labels, 10)


def test_a_graph_can_be_walked_twice():
    x, weight, labels = problem(torch.float64)
    loss = linear_cross_entropy(x, weight, labels, 10)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, (x, weight)), tuple(3 * part for part in first))


def test_a_second_derivative_is_refused():
    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 4), (5, 4)))
    loss = linear_cross_entropy(x, weight, torch.arange(6) % 5, 4)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(ConfigError, match="no derivative of its own"):
        gradient.square().sum().backward()
