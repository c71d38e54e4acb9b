import random

import pytest
import torch
import torch.distributed as dist

from longnet_dist.attention.functional import dilated_attention
from longnet_dist.attention.kernels.reference import oracle
from longnet_dist.attention.stream import Stream
from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.geometry.chunks import cache_bytes, cache_rows
from longnet_dist.geometry.pattern import DilatedPattern
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
        sizes.append(stream.layers[0]._rows.records.shape[2] // 2)
    assert max(sizes) <= sum(-(-branch.segment_length // branch.dilation_rate) for branch in pattern)


def test_chunks_must_follow_each_other():
    stream = Stream(DilatedPattern([4], [1]), 16, 1)
    first, second, _, _ = stream.chunks(4)
    stream.enter(first)
    with pytest.raises(ShapeError, match="begin at row 4, not 0"):
        stream.enter(first)
    stream.enter(second)


def errors_of_one_rank():
    """What each rank raises if the last one alone makes a mistake in a chunk; then a chunk without one."""
    rank, group = dist.get_rank(), dist.group.WORLD
    pattern, x = DilatedPattern([4, 16], [1, 2]), torch.ones(1, 4, 2, 4)
    raised = []

    def chunk(stream, x, **options):
        return dilated_attention(x, x, x, pattern, group=group, cache=stream.layers[0], **options)

    def mistakes(stream):
        yield lambda: chunk(stream, x[:, :3])
        yield lambda: chunk(stream, x, causal=False)
        yield lambda: chunk(stream, x[..., :1, :].contiguous())
        yield lambda: chunk(stream, x, backend="flash")
        other = Stream(pattern, 32, 1, num_ranks=2, rank=rank)
        yield lambda: chunk(other, x)
        other.shards = other.chunks(8)[1]
        yield lambda: chunk(other, x)

    stream = Stream(pattern, 32, 1, num_ranks=2, rank=rank)
    stream.enter(stream.chunks(8)[0])
    for mistake in mistakes(stream):
        try:
            mistake() if rank == 1 else chunk(stream, x)
        except (ShapeError, ConfigError) as error:
            raised.append(str(error))
    return raised, chunk(stream, x).shape


def test_a_mistake_of_one_rank_in_a_chunk_is_raised_on_all():
    """None waits for the other: each time both raise, and then go on."""
    (first, shape), (last, _) = run_distributed(errors_of_one_rank, 2, timeout_seconds=20.0)
    assert shape == (1, 4, 2, 4)
    assert len(first) == len(last) == 6
    assert "4 rows on this rank, but 3" in last[0]
    assert "causal" in last[1]
    assert all("rank 1 was refused" in message for message in (first[0], first[1], first[3], first[4]))
    assert all("differs from rank 0 in heads" in message for message in (first[2], last[2]))
    assert "runs on a GPU" in last[3]
    assert "enter a chunk first" in last[4]
    assert all("differs from rank 0 in chunk" in message for message in (first[5], last[5]))


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


def test_the_cache_is_as_large_as_the_formula_says():
    pattern, x = DilatedPattern.geometric(8, 256), torch.randn(3, 256, 2, 4)
    stream, largest = Stream(pattern, 256, 1), 0
    for shards in stream.forward(16):
        part = x[:, shards.start : shards.stop]
        dilated_attention(part, part, part, pattern, cache=stream.layers[0])
        largest = max(largest, stream.layers[0]._rows.records.nbytes)
    assert largest == cache_bytes(cache_rows(pattern, 256, 16), 2, 4, layers=1, itemsize=4, batch=3)


def pass_on(case, length, handover):
    """Output of a stream of which another one does the chunks from ``handover`` on."""
    ranks, rank, rows = dist.get_world_size(), dist.get_rank(), case.shards.total_rows
    group = dist.group.WORLD if ranks > 1 else None
    stream, outs = Stream(case.pattern, rows, 1, num_ranks=ranks, rank=rank), []
    for number, shards in enumerate(stream.chunks(length)):
        if number == handover:
            carried = stream.carried()
            stream = Stream(case.pattern, rows, 1, num_ranks=ranks, rank=rank)
            stream.resume(shards.start, [records.clone() for records in carried])
        stream.enter(shards)
        window = slice(*shards.window(rank))
        local = [x[:, window].contiguous() for x in (case.q, case.k, case.v)]
        outs.append((window, dilated_attention(*local, case.pattern, group=group, cache=stream.layers[0])))
    return outs


def worst_errors_of_resumed_streams(num_cases):
    ranks, worst = dist.get_world_size(), 0.0
    for seed in range(num_cases):
        case, rng = random_case(seed, ranks), random.Random(seed)
        rows = case.shards.total_rows
        length = rng.choice([c for c in range(1, rows + 1) if usable(c, rows, ranks)])
        expected, _ = oracle(case.q, case.k, case.v, case.pattern, causal=True)
        for window, out in pass_on(case, length, rng.randrange(-(-rows // length))):
            worst = max(worst, (out - expected[:, window]).abs().max().item())
    return worst


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_another_stream_goes_on_with_what_one_carried(ranks):
    assert max(run_distributed(worst_errors_of_resumed_streams, ranks, 40)) < 1e-9


def test_what_is_carried_must_fit():
    stream = Stream(DilatedPattern([8, 12], [1, 2]), 24, 2)
    with pytest.raises(ShapeError, match="2 segments are open at row 4"):
        stream.resume(4, [])
    with pytest.raises(ShapeError, match="14 rows a head"):
        stream.resume(4, [torch.zeros(2, 1, 13, 4)] * 2)
    stream.resume(0, [])


def test_a_bidirectional_sequence_is_one_chunk():
    pattern, x = DilatedPattern([8], [1]), torch.randn(1, 16, 1, 4, dtype=torch.float64)
    stream = Stream(pattern, 16, 1, causal=False)
    with pytest.raises(ConfigError, match="bidirectional"):
        stream.chunks(8)
    for _ in stream.forward(16):
        out = dilated_attention(x, x, x, pattern, causal=False, cache=stream.layers[0])
    torch.testing.assert_close(out, dilated_attention(x, x, x, pattern, causal=False))


@pytest.mark.parametrize(
    "change",
    [{"total_rows": 0}, {"total_rows": "8"}, {"num_layers": -1}, {"num_ranks": 0}, {"rank": 1}, {"rank": -1}],
    ids=str,
)
def test_numbers_that_a_stream_cannot_have_are_refused(change):
    with pytest.raises(ConfigError, match=f"{next(iter(change))} of a stream must be an integer of at least"):
        Stream(**{"pattern": DilatedPattern([4], [1]), "total_rows": 8, "num_layers": 1} | change)


def test_a_stream_refuses_other_chunks_rows_and_patterns():
    stream = Stream(DilatedPattern([4], [1]), 8, 1)
    with pytest.raises(ConfigError, match=r"chunk length must be an integer of at least 1 row, not 2\.5"):
        stream.chunks(2.5)
    with pytest.raises(ConfigError, match="at least 0 and at most 8, but is 9"):
        stream.resume(9, [])
    with pytest.raises(ConfigError, match="must be a DilatedPattern"):
        Stream([None], 8, 1)
