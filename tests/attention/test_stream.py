import random

import pytest
import torch
import torch.distributed as dist

from longnet_dist.attention.functional import dilated_attention
from longnet_dist.attention.stream import Stream
from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.kernels.reference import oracle
from tests.cases import random_case
from tests.distributed import run_distributed


def worst_errors(num_cases):
    """Largest difference of a stream's output and gradients from the oracle's on this rank, over chunk lengths."""
    ranks, rank, worst = dist.get_world_size(), dist.get_rank(), 0.0
    group = dist.group.WORLD if ranks > 1 else None
    for seed in range(num_cases):
        case = random_case(seed, ranks)
        rows = case.shards.total_rows
        length = random.Random(seed).choice([c for c in range(1, rows + 1) if usable(c, rows, ranks)])
        whole = [x.requires_grad_() for x in (case.q, case.k, case.v)]
        expected, _ = oracle(*whole, case.pattern, causal=True)
        wanted = [expected, *torch.autograd.grad(expected, whole, case.dout)]

        def chunk(stream, shards, requires_grad, case=case, whole=whole):
            window = slice(*shards.window(rank))
            local = [x.detach()[:, window].clone().requires_grad_(requires_grad) for x in whole]
            out = dilated_attention(*local, case.pattern, group=group, cache=stream.layers[0])
            return window, local, out

        stream = Stream(case.pattern, rows, 1, num_ranks=ranks, rank=rank)
        for shards in stream.forward(length):
            window, _, out = chunk(stream, shards, False)
            worst = max(worst, (out - expected[:, window]).abs().max().item())

        stream = Stream(case.pattern, rows, 1, num_ranks=ranks, rank=rank)
        for shards in stream.record(length):
            chunk(stream, shards, False)
        for shards in stream.replay(length):
            window, local, out = chunk(stream, shards, True)
            actual = [out, *torch.autograd.grad(out, local, case.dout[:, window])]
            worst = max(worst, *((a - b[:, window]).abs().max().item() for a, b in zip(actual, wanted, strict=True)))
    return worst


def usable(length, rows, ranks):
    """Whether chunks of this length, the last one too, give every rank a row."""
    try:
        Stream(DilatedPattern([1], [1]), rows, 1, num_ranks=ranks).chunks(length)
    except ShapeError:
        return False
    return True


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_stream_agrees_with_the_oracle_in_output_and_gradients(ranks):
    assert max(run_distributed(worst_errors, ranks, 40)) < 1e-9


def test_the_cache_holds_a_bounded_number_of_rows():
    pattern = DilatedPattern.geometric(8, 4096)
    stream = Stream(pattern, 4096, 1)
    x = torch.randn(1, 4096, 2, 4)
    sizes = []
    for shards in stream.forward(32):
        part = x[:, shards.start : shards.stop]
        dilated_attention(part, part, part, pattern, cache=stream.layers[0])
        sizes.append(len(stream.layers[0]._rows.records) // 2)
    assert max(sizes) <= sum(-(-branch.segment_length // branch.dilation_rate) for branch in pattern)


def test_chunks_must_follow_each_other():
    stream = Stream(DilatedPattern([4], [1]), 16, 1)
    first, second, _, _ = stream.chunks(4)
    stream.enter(first)
    with pytest.raises(ShapeError, match="begin at row 4, not 0"):
        stream.enter(first)
    stream.enter(second)


def test_only_a_recorded_stream_can_be_replayed():
    stream = Stream(DilatedPattern([8], [1]), 16, 1)
    with pytest.raises(ConfigError, match="recorded"):
        next(stream.replay(4))


def test_a_stream_is_causal_and_of_one_pattern():
    pattern, x = DilatedPattern([8], [1]), torch.zeros(1, 4, 1, 4)
    stream = Stream(pattern, 16, 1)
    stream.enter(stream.chunks(4)[0])
    with pytest.raises(ShapeError, match="causal"):
        dilated_attention(x, x, x, pattern, causal=False, cache=stream.layers[0])
    with pytest.raises(ShapeError, match="pattern"):
        dilated_attention(x, x, x, DilatedPattern([4], [1]), cache=stream.layers[0])
    with pytest.raises(ShapeError, match="4 rows on this rank, but 3"):
        dilated_attention(x[:, :3], x[:, :3], x[:, :3], pattern, cache=stream.layers[0])
