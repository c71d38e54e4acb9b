"""The algebra of the contract in float64: the running softmax, and gradients of pieces from LSE and delta alone."""

import itertools

import pytest
import torch

from longnet_dist.attention.kernels.backends.sdpa import SdpaKernel
from longnet_dist.attention.kernels.contract import BackwardInputs, Call, Gradients, with_lse_gradient
from longnet_dist.attention.kernels.reference import ReferenceKernel, oracle
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import dense_pieces

PATTERN = DilatedPattern([6, 11, 20, 20], [1, 2, 3, 4])
ROWS, HEADS, KV_HEADS, DIM, SCALE = 23, 4, 2, 4, 0.4
KERNELS = [ReferenceKernel(), SdpaKernel()]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(2, ROWS, heads, DIM, dtype=torch.float64, generator=generator) for heads in shapes]


def calls(causal):
    """One call for each branch."""
    for piece in dense_pieces(PATTERN, 0, ROWS, ROWS, causal):
        offsets = PATTERN.offsets(PATTERN.branches[piece.branch], KV_HEADS)
        yield Call(piece, offsets, causal, SCALE)


def run_forward(kernel, order, q, k, v):
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    for call in order:
        kernel.forward(call, q, k, v, out, lse)
    return out, lse


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_running_softmax_does_not_depend_on_the_order_of_the_branches(kernel, causal):
    q, k, v, _ = inputs()
    expected = oracle(q, k, v, PATTERN, causal=causal, scale=SCALE)
    orders = list(itertools.permutations(calls(causal)))
    assert len(orders) == 24
    for order in orders:
        assert_same(run_forward(kernel, order, q, k, v), expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_branch_gives_its_own_part_of_the_gradients(kernel, causal):
    """With the merged LSE and delta a branch's dV is Σ_i P_ij dO_i over its own pairs, and all parts add up."""
    q, k, v, dout = inputs()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    whole, _ = oracle(*leaves, PATTERN, causal=causal, scale=SCALE)
    expected = torch.autograd.grad(whole, leaves, dout)
    out, lse = run_forward(kernel, calls(causal), q, k, v)

    parts = []
    for call in calls(causal):
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        statistics = kernel.start_backward(dout, out, lse, dq)
        kernel.backward(call, BackwardInputs(dout, q, k, v, statistics), Gradients(dq, dk, dv))
        parts.append((dq, dk, dv))
        # The branch alone, with its weights in the whole softmax held fixed: dV is linear in them.
        alone = DilatedPattern([call.piece.segment_length], [call.piece.dilation_rate])
        leaf = v.clone().requires_grad_()
        branch_out, branch_lse = oracle(q, k, leaf, alone, causal=causal, scale=SCALE)
        share = (branch_lse - lse).exp()[..., None]
        assert_same(dv, torch.autograd.grad(branch_out * share, leaf, dout)[0])
    for total, gradients in zip(expected, zip(*parts, strict=True), strict=True):
        assert_same(sum(gradients), total)


def test_columns_carry_the_gradient_of_the_log_sum_exp():
    q, k, v, dout = (x[:, :, :KV_HEADS] for x in inputs())
    out, dlse = torch.randn_like(q), torch.randn(q.shape[:3], dtype=q.dtype)
    more_dout, more_q, more_k, more_v, more_out = with_lse_gradient((dout, q, k, v, out), dlse, 3)
    assert more_q.shape[-1] == DIM + 3
    assert_same(more_q[:, :, None] @ more_k.mT[:, None], q[:, :, None] @ k.mT[:, None])
    scores_gradient = torch.einsum("bihd,bjhd->bihj", more_dout, more_v) - (more_dout * more_out).sum(-1)[..., None]
    plain = torch.einsum("bihd,bjhd->bihj", dout, v) - ((dout * out).sum(-1) - dlse)[..., None]
    assert_same(scores_gradient, plain)
