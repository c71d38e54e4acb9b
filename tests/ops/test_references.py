"""The references in float64: against autograd, and against the formulas in their docstrings written out."""

import math

import pytest
import torch
from torch.nn import functional as F

from longnet_dist import DilatedPattern
from longnet_dist.attention.positions import Positions, rotate
from longnet_dist.ops.gelu_norm.reference import gelu_norm, gelu_norm_gradients
from longnet_dist.ops.join_gradients.reference import join_gradients
from longnet_dist.ops.matmul import reference as matmul
from longnet_dist.ops.norm_gradients.reference import norm_gradients

EPS = 1e-5
SHAPES = [(1, 8), (7, 24), (33, 64)]


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def average(x):
    return x.mean(-1, keepdim=True)


def deviation(x):
    return ((x - average(x)).square().mean(-1, keepdim=True) + EPS).sqrt()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_norm(shape):
    h, dy, weight, bias = normal(*shape).requires_grad_(), normal(*shape), normal(shape[1]), normal(shape[1])
    y = F.layer_norm(F.gelu(h), shape[1:], eps=EPS)
    (dh,) = torch.autograd.grad(y, h, dy)
    h = h.detach()
    assert_same(gelu_norm(h, weight, bias, EPS), y.detach() * weight + bias)
    assert_same(gelu_norm_gradients(dy, h, EPS), (y.detach(), dh, dh.sum(0)))

    cumulative = (1 + torch.erf(h / math.sqrt(2))) / 2  # Φ
    density = torch.exp(-h.square() / 2) / math.sqrt(2 * math.pi)  # φ
    a = h * cumulative
    y = (a - average(a)) / deviation(a)
    da = (dy - average(dy) - y * average(dy * y)) / deviation(a)
    assert_same(da * (cumulative + h * density), dh)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_gradients(shape, with_residual):
    x, dy, residual_grad, heads = normal(*shape).requires_grad_(), normal(*shape), normal(*shape), 4
    y = F.layer_norm(x, shape[1:], eps=EPS)
    # x also reaches the loss on the residual path, with the gradient residual_grad there.
    loss = (y * dy).sum() + (x * residual_grad).sum() * with_residual
    (expected,) = torch.autograd.grad(loss, x)
    x, dx = x.detach(), torch.full(shape, math.nan, dtype=torch.float64)
    delta = torch.empty(shape[0], heads, dtype=torch.float64)  # float32 elsewhere
    given = residual_grad if with_residual else None
    sums, normed = norm_gradients(dy, x, given, EPS, True, True, dx, delta)
    assert_same(dx, expected)
    assert_same(normed, y.detach())
    assert_same(sums, torch.stack([expected.sum(0), residual_grad.sum(0) * with_residual]))
    assert_same(delta, (expected * x).unflatten(1, (heads, -1)).sum(-1))

    normed = (x - average(x)) / deviation(x)
    written_out = (dy - average(dy) - normed * average(dy * normed)) / deviation(x)
    assert_same(written_out + residual_grad * with_residual, expected)


def test_norm_gradients_in_the_place_of_the_residual_gradient():
    x, dy, residual_grad = normal(9, 16), normal(9, 16), normal(9, 16)
    dx = torch.empty_like(x)
    expected, _ = norm_gradients(dy, x, residual_grad, EPS, True, False, dx, None)
    sums, _ = norm_gradients(dy, x, residual_grad, EPS, True, False, residual_grad, None)
    assert_same(sums, expected)
    assert_same(residual_grad, dx)


@pytest.mark.parametrize("positions", [None, Positions(), Positions(xpos_base=512)], ids=["none", "rope", "xpos"])
def test_join_gradients(positions):
    """One linear layer of three, then the token's map R of queries and keys."""
    rows, heads, kv_heads, dim, width = 19, 4, 2, 6, 10
    table = None
    if positions is not None:
        place = DilatedPattern([64], [1]), 3, rows, 10**5
        table = positions.table(*place, dim, torch.float64, torch.device("cpu"))
    numbers = [number * dim for number in (heads, kv_heads, kv_heads)]
    u, weight = normal(rows, width).requires_grad_(), normal(sum(numbers), width).requires_grad_()
    bias = normal(sum(numbers)).requires_grad_()
    q, k, v = (part.unflatten(1, (-1, dim)) for part in F.linear(u, weight, bias).split(numbers, 1))
    if table is not None:
        q, k = rotate(q, k, table)
    dq, dk, dv = (torch.randn_like(x) for x in (q, k, v))
    expected = torch.autograd.grad((q, k, v), (u, weight, bias), (dq, dk, dv))
    g, db = join_gradients(dq, dk, dv, table, torch.float64)
    with torch.no_grad():
        assert_same((g @ weight, g.T @ u, db), expected)


def test_the_transposed_maps_are_those_of_the_inner_product():
    """⟨R q, p⟩ = ⟨q, Rᵀ p⟩; with RoPE Rᵀ is also the inverse of R, with xPos it is not."""
    for positions in (Positions(), Positions(xpos_base=512)):
        place = DilatedPattern([64], [1]), 3, 21, 10**5
        table = positions.table(*place, 8, torch.float64, torch.device("cpu"))
        q, k, p, s = (normal(21, 2, 8) for _ in range(4))
        rotated, transposed = rotate(q, k, table), rotate(p, s, table.transposed())
        for x, y, of_x, of_y in zip(rotated, transposed, (q, k), (p, s), strict=True):
            assert_same((x * of_y).sum(), (of_x * y).sum())
        there_and_back = rotate(*rotated, table.transposed())
        same = all(torch.allclose(x, y, atol=1e-9) for x, y in zip(there_and_back, (q, k), strict=True))
        assert same == (positions.xpos_base is None)


@pytest.mark.parametrize("added", ["none", "other", "in place"])
def test_linear(added):
    x, weight, bias, out = normal(13, 8), normal(6, 8), normal(6), normal(13, 6)
    gain, shift = normal(8), normal(8)
    tokens = matmul.normed(x, gain, shift, EPS)
    expected = ((x - average(x)) / deviation(x) * gain + shift) @ weight.T + bias
    given = {"none": None, "other": normal(13, 6), "in place": out}[added]
    expected = expected if given is None else expected + given
    assert_same(matmul.linear(tokens, weight, bias, given), expected)
    matmul.write_linear(tokens, weight, bias, given, out)
    assert_same(out, expected)


def test_a_norm_commutes_with_a_matmul():
    """What the kernels of quack rest on: LN(x) Wᵀ = scale·(x Wᵀ) + shift·(row sums of W)."""
    x, weight = normal(13, 8), normal(6, 8)
    scale, shift = 1 / deviation(x), -average(x) / deviation(x)
    expected = F.layer_norm(x, (8,), eps=EPS) @ weight.T
    assert_same(scale * (x @ weight.T) + shift * weight.sum(1), expected)
