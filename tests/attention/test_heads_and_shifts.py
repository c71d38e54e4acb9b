"""Heads of a larger model, and shifted grids, on every backend; random cases of others have shifts too."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from longnet_dist.attention.functional import dilated_attention
from longnet_dist.attention.kernels.reference import oracle
from longnet_dist.attention.stream import Stream
from longnet_dist.errors import ConfigError, LongNetError, ShapeError
from longnet_dist.geometry.pattern import DilatedPattern
from tests.distributed import run_distributed

NESTED = DilatedPattern([16, 32, 64], [1, 2, 4], shift=[4, 20, 52])  # overlaps merge, first segments of three lengths


def tensors(rows, heads, kv_heads, dim=8, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(batch, rows, h, dim, dtype=dtype, generator=generator) for h in (heads, kv_heads, kv_heads)]


def part_of(tensors, heads, kv_heads, first, count):
    group = heads // kv_heads
    q, k, v = tensors
    kv = slice(first, first + count)
    return q[:, :, first * group : (first + count) * group], k[:, :, kv], v[:, :, kv]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("rule", ["modulo", "blocked"])
@pytest.mark.parametrize("shift", [None, [3, 7, 20]], ids=str)
def test_some_heads_give_what_the_whole_model_gives(backend, rule, shift):
    pattern = DilatedPattern([8, 20, 64], [2, 3, 7], rule, shift)
    qkv = tensors(50, 12, 6)
    whole = dilated_attention(*qkv, pattern, backend=backend)
    for first, count in ((0, 2), (2, 3), (5, 1)):
        own = part_of(qkv, 12, 6, first, count)
        out = dilated_attention(*own, pattern, backend=backend, first_head=first, total_heads=6)
        torch.testing.assert_close(out, whole[:, :, 2 * first : 2 * (first + count)], rtol=0, atol=1e-12)


def ranks_and_streams():
    """A rank's rows, and a chunk's, of some heads of a model."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    pattern, qkv = DilatedPattern([8, 20, 64], [2, 3, 7], shift=[5, 1, 33]), tensors(51, 12, 6)
    whole = oracle(*qkv, pattern)[0][:, :, 4:10]
    own, heads = part_of(qkv, 12, 6, 2, 3), {"first_head": 2, "total_heads": 6}
    rows = slice(26 * rank, 26 * (rank + 1))
    out = dilated_attention(*(x[:, rows] for x in own), pattern, group=dist.group.WORLD, **heads)
    torch.testing.assert_close(out, whole[:, rows], rtol=0, atol=1e-9)
    stream = Stream(pattern, 51, 1, num_ranks=ranks, rank=rank)
    for shards in stream.forward(14):
        window = slice(*shards.window(rank))
        local = [x[:, window] for x in own]
        out = dilated_attention(*local, pattern, group=dist.group.WORLD, cache=stream.layers[0], **heads)
        torch.testing.assert_close(out, whole[:, window], rtol=0, atol=1e-9)
    with pytest.raises(ShapeError, match="differs from rank 0 in first_head"):
        dilated_attention(
            *(x[:, :26] for x in own), pattern, group=dist.group.WORLD, first_head=2 + rank, total_heads=6
        )
    with pytest.raises(LongNetError, match="not all among 6" if rank else "rank 1 was refused"):
        dilated_attention(
            *(x[:, :26] for x in own), pattern, group=dist.group.WORLD, first_head=2 + 2 * rank, total_heads=6
        )
    return True


def test_over_ranks_and_in_chunks():
    assert all(run_distributed(ranks_and_streams, 2))


def test_heads_that_the_model_does_not_have_are_refused():
    qkv = tensors(9, 2, 2)
    with pytest.raises(ConfigError, match="heads 3 … 4 of this call are not all among 4"):
        dilated_attention(*qkv, DilatedPattern([4], [1]), first_head=3, total_heads=4)


@pytest.mark.parametrize("heads", [("0", 4), (0, 4.0), (True, 4), (torch.tensor([0, 1]), 4)], ids=str)
def test_heads_that_are_no_integers_are_refused(heads):
    first, total = heads
    with pytest.raises(ConfigError, match=r"must be an integer, not .*; leave it out"):
        dilated_attention(*tensors(9, 2, 2), DilatedPattern([4], [1]), first_head=first, total_heads=total)


# The interpreter of Triton 3.6 turns arrays of one element into numbers, which NumPy 1.25 and later warn of.
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize(
    ("pattern", "causal", "first", "edges"),
    [
        (NESTED, True, 0, None),
        (NESTED, False, 3, None),
        (NESTED.of_layer(2, offsets=True), True, 1, [2, 9, 30]),
        (DilatedPattern([16, 32], [1, 3], "blocked", shift=[9, 2]), True, 2, None),
    ],
    ids=str,
)
def test_the_triton_kernels_take_shifts_and_heads(pattern, causal, first, edges):
    """In the interpreter, or on a GPU."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, total = 76, 6
    whole = [x.to(device) for x in tensors(rows, total, total, 16, torch.float32, 1)]
    inputs = [x.detach().contiguous().requires_grad_() for x in part_of(whole, total, total, first, 2)]
    dout = torch.randn_like(inputs[0])
    out = dilated_attention(
        *inputs, pattern, causal=causal, backend="triton", cu_seqlens=edges, first_head=first, total_heads=total
    )
    exact = [x.double().requires_grad_() for x in whole]
    if edges is None:
        expected = oracle(*exact, pattern, causal=causal)[0]
    else:
        parts = [slice(start, stop) for start, stop in pairwise(edges)]
        outs = [oracle(*(x[:, part] for x in exact), pattern, causal=causal)[0] for part in parts]
        expected = torch.nn.functional.pad(torch.cat(outs, 1), (0, 0, 0, 0, edges[0], rows - edges[-1]))
    expected = expected[:, :, first : first + 2]
    gradients = [x[:, :, first : first + 2] for x in torch.autograd.grad(expected, exact, dout.double())]
    for a, b in zip([out, *torch.autograd.grad(out, inputs, dout)], [expected, *gradients], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
