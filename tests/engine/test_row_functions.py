"""The hand-written gradients of a block's row-wise parts against autograd, in float64."""

import pytest
import torch

from longnet_dist import DilatedPattern
from longnet_dist.attention.positions import Positions
from longnet_dist.engine.norm_folding import fold_norms
from longnet_dist.engine.row_functions import (
    add_projection_gradients,
    after_attention,
    before_attention,
    norm_input,
    write_attention_residual,
    write_output_gradients,
    write_queries_and_keys,
)
from longnet_dist.engine.rows import _stacked, _zeros
from longnet_dist.model.longnet import LongNet
from longnet_dist.ops.gelu_norm.choice import PLAIN
from longnet_dist.ops.join_gradients.reference import join_gradients
from longnet_dist.ops.matmul.choice import REFERENCE
from longnet_dist.ops.norm_gradients.reference import norm_gradients
from tests.engine.test_block_run import model_config

EPS, ROWS, DIM, HEADS, KV_HEADS, HEAD_DIM = 1e-5, 13, 16, 4, 2, 4
BEFORE = tuple(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"))
POSITIONS = [None, Positions(), Positions(xpos_base=512)]


def block_weights(qk_norm=False):
    """Folded weights, as the gradients take them: linear layers that took the norms' weights over."""
    torch.manual_seed(0)
    block = LongNet(model_config(qk_norm=qk_norm)).double().blocks[0]
    with torch.no_grad():
        for vector in (parameter for parameter in block.parameters() if parameter.dim() == 1):
            vector += torch.randn_like(vector) / 4
        return {name: weight.clone() for name, weight in fold_norms(dict(block.named_parameters())).items()}


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def without_gain(weights):
    """Weights for the functions that autograd records, which take those of the last norm by name."""
    ones, zeros = torch.ones_like(weights["ffn.fc1.bias"]), torch.zeros_like(weights["ffn.fc1.bias"])
    return weights | {"ffn.ffn_layernorm.weight": ones, "ffn.ffn_layernorm.bias": zeros}


def test_gradients_of_the_output():
    weights = block_weights()
    behind = {name: weights[name] for name in weights if name.startswith(("self_attn.out_proj", "ffn"))}
    x, out, dz = normal(ROWS, DIM), normal(ROWS, HEADS, HEAD_DIM), normal(ROWS, DIM)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, out, *behind.values())]
    z = after_attention(*leaves[:2], without_gain(dict(zip(behind, leaves[2:], strict=True))), EPS)
    dx, dout, *expected = torch.autograd.grad(z, leaves, dz)

    y = torch.empty_like(x)
    f, moments = write_attention_residual(x, out, weights, EPS, REFERENCE, PLAIN, y)
    assert_same(y + torch.nn.functional.linear(f, weights["ffn.fc2.weight"], weights["ffn.fc2.bias"]), z.detach())
    assert moments == ()

    found_dx, found_dout, sums = torch.empty_like(x), torch.empty(ROWS, DIM, dtype=torch.float64), _zeros(behind)
    delta = torch.empty(ROWS, HEADS, dtype=torch.float64)
    kernels = REFERENCE, PLAIN, norm_gradients
    write_output_gradients(x, out, dz, (), weights, EPS, *kernels, found_dx, found_dout, delta, sums)
    assert_same(found_dx, dx)
    assert_same(found_dout.view_as(dout), dout)
    assert_same(delta, (dout * out).sum(-1))
    for name, gradient in zip(behind, expected, strict=True):
        assert_same(sums[name], gradient)
    # The sums are over tiles: another call adds to them.
    write_output_gradients(x, out, dz, (), weights, EPS, *kernels, found_dx, found_dout, None, sums)
    for name, gradient in zip(behind, expected, strict=True):
        assert_same(sums[name], 2 * gradient)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("positions", POSITIONS, ids=["none", "rope", "xpos"])
def test_gradients_of_the_projections(positions, qk_norm):
    weights = block_weights(qk_norm)
    before = {name: weights[name] for name in weights if name.startswith(BEFORE)}
    assert len(before) == (8 if qk_norm else 6)
    table = None
    if positions is not None:
        place = DilatedPattern([64], [1]), 3, ROWS, 10**5
        table = positions.table(*place, HEAD_DIM, torch.float64, torch.device("cpu"))
    x, residual = normal(ROWS, DIM), normal(ROWS, DIM)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, *before.values())]
    q, k, v = before_attention(leaves[0], table, dict(zip(before, leaves[1:], strict=True)), HEAD_DIM, EPS)
    gradients = tuple(torch.randn_like(part) for part in (q, k, v))
    dx, *expected = torch.autograd.grad((q, k, v), leaves, gradients)

    written = [torch.empty_like(part) for part in (q, k)]
    u = write_queries_and_keys(x, table, weights, HEAD_DIM, EPS, REFERENCE, *written)
    assert_same(written, [q.detach(), k.detach()])
    assert_same(u, norm_input(x, weights, EPS, REFERENCE))

    stacked = _stacked(before)
    sums, found_dx = _zeros(stacked), residual.clone()
    kernels = REFERENCE, join_gradients, norm_gradients
    add_projection_gradients(x, gradients, table, stacked, HEAD_DIM, EPS, *kernels, found_dx, sums)
    assert_same(found_dx, residual + dx)
    by_name = dict(zip(before, expected, strict=True))
    for kind in ("weight", "bias"):
        parts = [by_name[f"self_attn.{name}_proj.{kind}"] for name in "qkv"]
        assert_same(sums[f"self_attn.qkv_proj.{kind}"], torch.cat(parts))
    for name in (name for name in before if "_norm." in name):
        assert_same(sums[name], by_name[name])
