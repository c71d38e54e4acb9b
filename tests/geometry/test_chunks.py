import random

import pytest

from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.geometry.chunks import cache_bytes, cache_rows, chunks_of, record_rows, recorded_segments
from longnet_dist.geometry.exchange_plan import buffered_segments
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import open_segments


def rows_of(segments):
    return sum(segment.compact_rows for segment in segments)


def held_at_most(pattern, chunks):
    """Return the most rows that any rank buffers during any chunk."""
    ranks = range(chunks[0].num_ranks)
    return max(rows_of(buffered_segments(pattern, chunk, rank, causal=True)) for chunk in chunks for rank in ranks)


def random_stream(seed):
    rng = random.Random(seed)
    total, ranks = rng.randint(1, 300), rng.randint(1, 4)
    branches = rng.randint(1, 4)
    widths = [rng.choice([rng.randint(1, 350), 2 ** rng.randint(0, 8)]) for _ in range(branches)]
    rates, lengths = [rng.randint(1, 9) for _ in range(branches)], list(range(1, total + 1))
    rng.shuffle(lengths)
    shift = [rng.choice([0, 8 % width, rng.randrange(width)]) for width in widths] if seed % 3 == 0 else None
    pattern = DilatedPattern(widths, rates, shift=shift)
    for length in lengths:
        try:
            return pattern, chunks_of(total, length, ranks), length
        except ShapeError:
            continue
    return random_stream(seed + 1000)


def test_chunks_cover_the_sequence_in_order():
    chunks = chunks_of(25, 10, 2)
    assert [(chunk.start, chunk.stop) for chunk in chunks] == [(0, 10), (10, 20), (20, 25)]
    assert [chunk.window(1) for chunk in chunks] == [(5, 10), (15, 20), (23, 25)]


def test_chunks_that_cannot_be():
    with pytest.raises(ConfigError, match="at least 1 row, not 0"):
        chunks_of(10, 0)
    with pytest.raises(ShapeError, match="leave"):
        chunks_of(21, 10, 2)


@pytest.mark.parametrize("seed", range(300))
def test_no_stream_holds_more_than_the_formulas_say(seed):
    pattern, chunks, length = random_stream(seed)
    total, ranks = chunks[0].total_rows, chunks[0].num_ranks
    assert held_at_most(pattern, chunks) <= cache_rows(pattern, total, length, ranks)
    recorded = max(rows_of(recorded_segments(pattern, chunks, rank, True)) for rank in range(ranks))
    assert recorded <= record_rows(pattern, total, length, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("length", [64, 512, 4096])
def test_the_formulas_are_exact_where_chunks_and_segments_are_powers_of_two(ranks, length):
    pattern, total = DilatedPattern.geometric(32, 8192), 8192
    chunks = chunks_of(total, length, ranks)
    assert held_at_most(pattern, chunks) == cache_rows(pattern, total, length, ranks)
    if ranks == 1:
        crossing = [branch for branch in pattern if branch.segment_length > length]
        expected = sum(total // branch.dilation_rate for branch in crossing)
        assert rows_of(recorded_segments(pattern, chunks, 0, True)) == record_rows(pattern, total, length) == expected


def test_the_cache_of_a_billion_rows_is_as_small_as_that_of_a_million():
    pattern = DilatedPattern.geometric(2048, 2**30)
    assert cache_rows(pattern, 2**30, 2**20) == 10 * 2048
    assert cache_rows(pattern, 2**30, 1) == len(pattern) * 2048
    assert cache_bytes(10 * 2048, 8, 64, 4, 2, 3) == 10 * 2048 * 8 * 2 * 64 * 4 * 2 * 3


def test_open_segments_are_those_that_go_on():
    pattern = DilatedPattern([4, 6, 100], [1, 2, 3])
    assert open_segments(pattern, 0, 20) == ()
    assert [(s.branch, s.index, s.start, s.stop) for s in open_segments(pattern, 8, 20)] == [
        (1, 1, 6, 12),
        (2, 0, 0, 20),
    ]
    assert open_segments(pattern, 20, 20) == ()
