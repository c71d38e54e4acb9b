"""Packed documents: each gives what it gives alone, on one process, over ranks and in streams."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist

from longnet_dist import DilatedAttention, Positions
from longnet_dist.attention.functional import dilated_attention
from longnet_dist.attention.kernels.reference import oracle
from longnet_dist.attention.stream import Stream
from longnet_dist.errors import ShapeError
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import Shards
from tests.attention.test_sink import gradients, with_sink
from tests.attention.test_stream import usable
from tests.cases import seeds
from tests.distributed import run_distributed

BACKENDS = ("reference", "sdpa")


def random_edges(rng, rows, lengths):
    """Edges anywhere; around documents of one row; at the edges of segments; or of one document, longer than most."""
    kind = rng.choice(["anywhere", "anywhere", "one row", "segments", "long"])
    if kind == "one row":
        first = rng.randrange(rows)
        return sorted({rng.randint(0, first), *range(first, min(first + rng.randint(1, 5), rows) + 1), rows})
    if kind == "segments":
        width = rng.choice(lengths)
        first = rng.randrange(min(width, rows))
        return [*range(first, rows, width), rows] if rng.random() < 0.5 else sorted({0, min(width, rows), rows})
    if kind == "long":
        return [rng.randrange(1 + rows // 8), rows]
    return sorted(rng.sample(range(rows + 1), rng.randint(2, min(rows + 1, 8))))


def packed_case(seed, ranks=1):
    """A random case with a sink, and edges: one list, or one for each item."""
    case, sink, dlse = with_sink(seed, ranks)
    rng, batch, rows = random.Random(seed), case.q.shape[0], case.q.shape[1]
    lists = [random_edges(rng, rows, case.pattern.segment_lengths) for _ in range(batch if seed % 3 == 0 else 1)]
    return case, sink if seed % 2 else None, dlse, lists if seed % 3 == 0 else lists[0]


def alone(inputs, edges, pattern, causal):
    """Output and log-sum-exp of the oracle on every document by itself; padding gives 0 and ``-inf``."""
    q, k, v, *sink = inputs
    batch, rows, heads, _ = q.shape
    outs, lses = [], []
    for item in range(batch):
        own = edges[item] if isinstance(edges[0], list) else edges
        out, lse = q[item : item + 1] * 0, q.new_full((1, rows, heads), -torch.inf)
        for start, stop in pairwise(own):
            part = slice(start, stop)
            qkv = (x[item : item + 1, part] for x in (q, k, v))
            given = sink[0].expand(batch, rows, heads)[item : item + 1, part] if sink else None
            found = oracle(*qkv, pattern, causal=causal, sink=given)
            out, lse = (
                torch.cat([whole[:, :start], own_part, whole[:, stop:]], 1)
                for whole, own_part in zip((out, lse), found, strict=True)
            )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


ALL = slice(None)


def leaves(case, sink, rows=ALL):
    part = [] if sink is None else [sink if sink.dim() == 1 else sink[..., rows, :]]
    return [x.clone().requires_grad_() for x in (*(x[:, rows] for x in (case.q, case.k, case.v)), *part)]


def wanted(case, sink, dlse, edges, causal):
    inputs = leaves(case, sink)
    out, lse = alone(inputs, edges, case.pattern, causal)
    return [out, lse, *gradients(out, lse, inputs, case.dout, dlse)]


def assert_same(actual, expected, **tolerance):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 1e-9} | tolerance))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", seeds(60, 300))
def test_a_document_gives_what_it_gives_alone(backend, seed):
    case, sink, dlse, edges = packed_case(seed)
    inputs = leaves(case, sink)
    options = {"causal": case.causal, "backend": backend, "return_lse": True, "cu_seqlens": edges}
    out, lse = dilated_attention(*inputs[:3], case.pattern, sink=inputs[3] if inputs[3:] else None, **options)
    actual = [out, lse, *gradients(out, lse, inputs, case.dout, dlse)]
    assert_same(actual, wanted(case, sink, dlse, edges, case.causal))


def check_ranks(first, stop):
    for seed in range(first, stop):
        ranks, rank = dist.get_world_size(), dist.get_rank()
        case, sink, dlse, edges = packed_case(seed, ranks)
        rows = slice(*case.shards.window(rank))
        inputs = leaves(case, sink, rows)
        out, lse = dilated_attention(
            *inputs[:3], case.pattern, causal=case.causal, group=dist.group.WORLD, backend=BACKENDS[seed % 2],
            return_lse=True, cu_seqlens=edges, sink=inputs[3] if inputs[3:] else None, overlap=seed % 5 > 0,
        )  # fmt: skip
        actual = [out, lse, *gradients(out, lse, inputs, case.dout[:, rows], dlse[:, rows])]
        expected = wanted(case, sink, dlse, edges, case.causal)
        assert_same(actual[:5], [x[:, rows] for x in expected[:5]])
        if sink is not None and sink.dim() == 1:
            dist.all_reduce(actual[5])
            assert_same(actual[5:], expected[5:])
        elif sink is not None:
            assert_same(actual[5:], [expected[5][..., rows, :]])
    return True


DEFAULT, LONG = pytest.param(0, 12), pytest.param(12, 60, marks=pytest.mark.long)


@pytest.mark.parametrize(("first", "stop"), [DEFAULT, LONG])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_over_ranks(ranks, first, stop):
    assert all(run_distributed(check_ranks, ranks, first, stop))


def check_streams(first, stop):
    ranks, rank = dist.get_world_size(), dist.get_rank()
    group = dist.group.WORLD if ranks > 1 else None
    for seed in range(first, stop):
        case, _, dlse, edges = packed_case(3 * seed + 1, ranks)  # one list for all items
        rng, rows = random.Random(seed), case.shards.total_rows
        expected = wanted(case, None, dlse, edges, True)
        length = rng.choice([c for c in range(1, rows + 1) if usable(c, rows, ranks)])
        stream = Stream(case.pattern, rows, 1, num_ranks=ranks, rank=rank, cu_seqlens=edges)

        def chunk(shards, requires_grad, case=case, stream=stream, group=group, seed=seed):
            window = slice(*shards.window(rank))
            inputs = [x.requires_grad_(requires_grad) for x in leaves(case, None, window)]
            options = {"group": group, "cache": stream.layers[0], "backend": BACKENDS[seed % 2]}
            return window, inputs, *dilated_attention(*inputs, case.pattern, return_lse=True, **options)

        for shards in stream.record(length):
            chunk(shards, False)
        for shards in stream.replay(length):
            window, inputs, out, lse = chunk(shards, True)
            actual = [out, lse, *gradients(out, lse, inputs, case.dout[:, window], dlse[:, window])]
            assert_same(actual, [x[:, window] for x in expected])
    return True


@pytest.mark.parametrize(("first", "stop"), [DEFAULT, LONG])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_in_a_stream(ranks, first, stop):
    assert all(run_distributed(check_streams, ranks, first, stop))


@pytest.mark.parametrize("seed", seeds(12, 60))
def test_in_chunks_of_any_lengths(seed):
    """Forward, with a sink: each chunk has a length of its own."""
    case, sink, dlse, edges = packed_case(3 * seed + 1)
    rng, rows = random.Random(seed), case.shards.total_rows
    out, lse, *_ = wanted(case, sink, dlse, edges, True)
    stream, start = Stream(case.pattern, rows, 1, cu_seqlens=edges), 0
    while start < rows:
        stop = rng.randint(start + 1, min(rows, start + 1 + rows // 3))
        window = slice(start, stop)
        shards = stream.enter(Shards(rows, stop - start, 1, start, stop))
        own = None if sink is None else sink if sink.dim() == 1 else sink[..., window, :]
        options = {"sink": own, "return_lse": True, "backend": BACKENDS[seed % 2]}
        local = [x[:, window] for x in (case.q, case.k, case.v)]
        found = dilated_attention(*local, case.pattern, cache=stream.layers[0], **options)
        assert_same(found, [out[:, window], lse[:, window]])
        start = shards.stop


# The interpreter of Triton 3.6 turns arrays of one element into numbers, which NumPy 1.25 and later warn of.
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize(
    ("edges", "causal", "deterministic"),
    [
        ([0, 5, 6, 40, 57, 90], True, False),
        ([[0, 90], [2, 31, 64]], False, True),
        *(
            pytest.param(edges, causal, not causal, marks=pytest.mark.long)
            for edges in ([3, 33, 65, 81], [[0, 90], [2, 31, 64]], [0, 5, 6, 40, 57, 90])
            for causal in (True, False)
        ),
    ],
    ids=str,
)
def test_the_triton_kernels_take_documents(edges, causal, deterministic):
    """With merged overlaps, longer and shorter than every segment; in the interpreter or on a GPU."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pattern = DilatedPattern([16, 32, 64], [1, 2, 4])
    inputs = [torch.randn(2, 90, heads, 16, device=device).requires_grad_() for heads in (4, 2, 2)]
    dout = torch.randn_like(inputs[0])
    options = {"causal": causal, "backend": "triton", "deterministic": deterministic, "cu_seqlens": edges}
    out = dilated_attention(*inputs, pattern, **options)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected, _ = alone(exact, edges, pattern, causal)
    actual = [out, *torch.autograd.grad(out, inputs, dout)]
    wide = [expected, *torch.autograd.grad(expected, exact, dout.double())]
    assert_same([x.double() for x in actual], wide, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize("seed", seeds(2, 20))
def test_the_triton_kernels_take_random_documents(seed):
    pytest.importorskip("triton")
    case, sink, dlse, edges = packed_case(seed)
    exact = leaves(case, sink)
    out, lse = alone(exact, edges, case.pattern, case.causal)
    expected = [out, lse, *gradients(out, lse, exact, case.dout, dlse)]
    inputs = [x.detach().float().requires_grad_() for x in exact]
    options = {"causal": case.causal, "backend": "triton", "return_lse": True, "cu_seqlens": edges}
    out, lse = dilated_attention(*inputs[:3], case.pattern, sink=inputs[3] if inputs[3:] else None, **options)
    actual = [out, lse, *gradients(out, lse, inputs, case.dout.float(), dlse.float())]
    assert_same([x.double() for x in actual], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_change_no_bit(backend):
    torch.manual_seed(0)
    pattern, edges = DilatedPattern([8, 16, 32], [1, 2, 4]), [0, 7, 50, 51, 90]
    inputs = [torch.randn(1, 90, heads, 8).requires_grad_() for heads in (4, 2, 2)]
    dout = torch.randn_like(inputs[0])

    def results(rows, cu_seqlens):
        own = [x[:, rows].detach().clone().requires_grad_() for x in inputs]
        out = dilated_attention(*own, pattern, backend=backend, deterministic=True, cu_seqlens=cu_seqlens)
        return [out, *torch.autograd.grad(out, own, dout[:, rows])]

    packed = results(slice(None), edges)
    for start, stop in pairwise(edges):
        own = results(slice(start, stop), [0, stop - start])
        assert all(torch.equal(a[:, start:stop], b) for a, b in zip(packed, own, strict=True))


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([0, 4, 4, 9], "strictly increasing, but 4 is followed by 4"),
        ([0, 5, 3, 9], "strictly increasing, but 5 is followed by 3"),
        ([0, 10], "has 9 rows over all ranks, but the last is 10"),
        ([-1, 9], "count rows from 0, but begin with -1"),
        ([3], "at least one document"),
        ([], "at least one document"),
        ([0, 4.5, 9], r"must be integers, but are \[0, 4.5, 9\]; give integers of the host"),
        ([[0, 9], 9], "must be integers"),
        ([True, 9], "must be integers"),
        ([0, 2**70], "has 9 rows over all ranks"),
        (np.array([0, 4.5]), "must be integers"),
        (9, "must be a list of document edges, not 9; give"),
        ([[0, 9], [0, 4, 9], [0, 9]], "one for each of the 2 batch items, but there are 3 lists"),
        ("0 9", "must be a list"),
        (torch.zeros(2, device="meta"), "must be integers of the host"),
        ([torch.zeros(2, device="meta")] * 2, "must be integers of the host"),
    ],
    ids=str,
)
def test_wrong_edges_are_refused(edges, message):
    q = torch.zeros(2, 9, 2, 4)
    with pytest.raises(ShapeError, match=message):
        dilated_attention(q, q, q, DilatedPattern([4], [1]), cu_seqlens=edges)


def test_edges_may_be_an_array_or_a_tensor_of_the_host():
    case, *_ = packed_case(1)
    rows = case.q.shape[1]
    qkv = case.q, case.k, case.v
    results = [
        dilated_attention(*qkv, case.pattern, cu_seqlens=edges)
        for edges in (
            [0, rows], (0, rows), range(0, rows + 1, rows), torch.tensor([0, rows]), np.array([0, rows]),
            list(torch.tensor([0, rows])), list(np.array([0, rows])),
            [np.array([0, rows])] * len(case.q), (torch.tensor([0, rows]),) * len(case.q),
        )
    ]  # fmt: skip
    assert all(torch.equal(result, results[0]) for result in results)


def refusals(edges_of_rank):
    q = torch.zeros(2, 5, 2, 4)
    with pytest.raises(ShapeError) as error:
        dilated_attention(
            q, q, q, DilatedPattern([4], [1]), group=dist.group.WORLD, cu_seqlens=edges_of_rank[dist.get_rank()]
        )
    return str(error.value)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (([0, 10], [0, 4, 10]), "differs from rank 0 in documents"),
        (([0, 10], [0, 0, 10]), "strictly increasing|was refused"),
        (([0, 11], [0, 11]), "has 10 rows over all ranks, but the last is 11"),
        (([[0, 10], [0, 10]], [[0, 10], [0, 9]]), "documents"),
        (([0, 10], None), "differs from rank 0 in documents"),
    ],
    ids=str,
)
def test_edges_that_differ_are_refused_on_all_ranks(edges, message):
    for said in run_distributed(refusals, 2, edges):
        assert any(part in said for part in message.split("|"))


@pytest.mark.parametrize("positions", [None, Positions(), Positions(xpos_base=64)], ids=["none", "rope", "xpos"])
@pytest.mark.parametrize("edges", [[0, 9, 31], [4, 11, 29], [[0, 31], [3, 8, 30]]], ids=str)
def test_a_layer_takes_documents(positions, edges):
    """Positions count from the first row of a document; xPos has its own span in each."""
    torch.manual_seed(0)
    pattern = DilatedPattern([8, 20, 64], [1, 2, 4])
    layer = DilatedAttention(16, 4, pattern, kv_heads=2, positions=positions, qk_norm=True, sinks=True).double()
    x = torch.randn(2, 31, 16, dtype=torch.float64)
    packed = layer(x, cu_seqlens=edges)
    for item in range(2):
        own = edges[item] if isinstance(edges[0], list) else edges
        for start, stop in pairwise(own):
            expected = layer(x[item : item + 1, start:stop])
            torch.testing.assert_close(packed[item : item + 1, start:stop], expected, rtol=0, atol=1e-9)


def test_flops_count_documents():
    pattern = DilatedPattern([8, 20], [1, 3])
    edges = [3, 9, 40, 46, 100]
    expected = sum(pattern.flops(stop - start, 4, 8, True, 2) for start, stop in pairwise(edges))
    assert pattern.flops(100, 4, 8, True, 2, cu_seqlens=edges) == expected
    with pytest.raises(ShapeError, match="the last is 100"):
        pattern.flops(99, 4, 8, True, 2, cu_seqlens=edges)
