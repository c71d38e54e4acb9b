"""Queries of the last rows of a sequence alone, against the oracle in float64."""

import random

import pytest
import torch
import torch.distributed as dist

from longnet_dist.attention.functional import dilated_attention
from longnet_dist.attention.kernels.reference import oracle
from longnet_dist.attention.stream import Stream
from longnet_dist.errors import ShapeError
from longnet_dist.geometry.pattern import DilatedPattern
from tests.attention.test_documents import assert_same, packed_case, wanted
from tests.attention.test_sink import gradients
from tests.distributed import run_distributed


def last_rows(sink, first):
    return sink if sink.dim() == 1 else sink[..., first:, :]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("seed", range(100))
def test_the_last_rows_give_what_they_give_among_all(backend, seed):
    """Documents, one list or one for each item, sinks, shifts, both masks; gradients of all keys."""
    case, sink, dlse, edges = packed_case(seed)
    rows = case.q.shape[1]
    if seed % 4 == 0:
        edges = [0, rows]
    first = rows - random.Random(seed).randint(1, rows)
    case.dout[:, :first], dlse[:, :first] = 0, 0
    out, lse, dq, *others = wanted(case, sink, dlse, edges, case.causal)
    if sink is not None:
        others[2] = last_rows(others[2], first)
        sink = last_rows(sink, first)
    inputs = [
        x.clone().requires_grad_() for x in (case.q[:, first:], case.k, case.v, *([] if sink is None else [sink]))
    ]
    options = {"backend": backend, "return_lse": True, "sink": inputs[3] if inputs[3:] else None}
    if seed % 4:
        options["cu_seqlens"] = edges
    actual = dilated_attention(*inputs[:3], case.pattern, causal=case.causal, **options)
    found = gradients(*actual, inputs, case.dout[:, first:], dlse[:, first:])
    assert_same([*actual, *found], [out[:, first:], lse[:, first:], dq[:, first:], *others])


# The interpreter of Triton 3.6 turns arrays of one element into numbers, which NumPy 1.25 and later warn of.
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize(("causal", "queries"), [(True, 33), (True, 1), (False, 48)])
def test_the_triton_kernels_take_short_queries(causal, queries):
    """With merged overlaps; 48 of 80 rows begin at an edge of the first branch, whose launch writes fresh buffers."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pattern = DilatedPattern([16, 32, 64], [1, 2, 4])
    inputs = [torch.randn(1, n, h, 16, device=device).requires_grad_() for n, h in ((queries, 4), (80, 2), (80, 2))]
    out = dilated_attention(*inputs, pattern, causal=causal, backend="triton")
    exact = [x.detach().double().requires_grad_() for x in inputs]
    q = torch.nn.functional.pad(exact[0], (0, 0, 0, 0, 80 - queries, 0))
    expected = oracle(q, *exact[1:], pattern, causal=causal)[0][:, -queries:]
    dout = torch.randn_like(out)
    actual = [out, *torch.autograd.grad(out, inputs, dout)]
    assert_same(
        [x.double() for x in actual],
        [expected, *torch.autograd.grad(expected, exact, dout.double())],
        rtol=1e-4,
        atol=1e-4,
    )


def test_more_queries_than_keys_are_refused():
    q, k = torch.zeros(1, 9, 2, 4), torch.zeros(1, 8, 2, 4)
    with pytest.raises(ShapeError, match="q must have as many rows as k"):
        dilated_attention(q, k, k, DilatedPattern([4], [1]))
    stream = Stream(DilatedPattern([4], [1]), 8, 1)
    stream.enter(stream.chunks(8)[0])
    with pytest.raises(ShapeError, match="outside a stream"):
        dilated_attention(q[:, :7], k, k, DilatedPattern([4], [1]), cache=stream.layers[0])


def refusals():
    q, k = torch.zeros(1, 3, 2, 4), torch.zeros(1, 8, 2, 4)
    with pytest.raises(ShapeError, match="over ranks give every rank the rows of its slice"):
        dilated_attention(q, k, k, DilatedPattern([4], [1]), group=dist.group.WORLD)
    return True


def test_short_queries_over_ranks_are_refused_on_all():
    assert all(run_distributed(refusals, 2))
