import pytest
import torch

from longnet_dist.attention.kernels.reference import attended_counts
from longnet_dist.errors import ShapeError
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import (
    Shards,
    compact_piece,
    dense_pieces,
    edge_segments,
    needs_exchange,
    shared_segments,
)
from tests.cases import random_case


def attended_by_pieces(pattern, start, stop, total_rows, kv_heads, causal):
    """Count the (query, key) pairs that the pieces of a window compute, ``(Hkv, N, N)`` in global rows."""
    count = torch.zeros(kv_heads, total_rows, total_rows, dtype=torch.int64)
    shared = [compact_piece(pattern, s, start, stop) for s in shared_segments(pattern, start, stop, total_rows, causal)]
    for piece in [*dense_pieces(pattern, start, stop, total_rows, causal), *shared]:
        for segment in range(piece.first_segment, piece.first_segment + piece.num_segments):
            for head, offset in enumerate(pattern.offsets(pattern.branches[piece.branch], kv_heads)):
                origin = piece.bounds(segment)[0] + offset
                row, queries, first = piece.queries(segment, offset)
                key_row, keys, step = piece.keys(segment, offset)
                if queries:
                    assert row + start == origin + first * piece.dilation_rate
                if keys and not piece.compact:
                    assert (key_row + start, step) == (origin, piece.dilation_rate)
                for j in range(first, first + queries):
                    for i in range(min(keys, j + 1) if causal else keys):
                        count[head, origin + j * piece.dilation_rate, origin + i * piece.dilation_rate] += 1
    return count


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(12))
def test_pieces_of_all_windows_cover_the_definition_once(ranks, seed):
    case = random_case(seed, ranks)
    pattern, shards, kv_heads = case.pattern, case.shards, case.k.shape[2]
    windows = [shards.window(rank) for rank in range(ranks)]
    counts = [attended_by_pieces(pattern, *w, shards.total_rows, kv_heads, case.causal) for w in windows]
    assert torch.equal(sum(counts), attended_counts(pattern, shards.total_rows, kv_heads, case.causal))
    for (start, stop), count in zip(windows, counts, strict=True):
        assert count[:, :start].sum() == count[:, stop:].sum() == 0


def test_a_window_has_at_most_one_dense_piece_and_two_shared_segments_a_branch():
    pattern = DilatedPattern.geometric(2048, 2**30)
    shards = Shards.even(2**30, 4096)
    for rank in (0, 1, 2047, 4095):
        window = shards.window(rank)
        dense = [piece.branch for piece in dense_pieces(pattern, *window, 2**30, True)]
        shared = [segment.branch for segment in shared_segments(pattern, *window, 2**30, True)]
        assert len(set(dense)) == len(dense)
        assert max(shared.count(branch) for branch in range(len(pattern))) <= 2
        assert set(dense) | set(shared) == set(range(len(pattern)))


def test_shards_of_uneven_length():
    shards = Shards.even(10, 4)
    assert [shards.window(rank) for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 10)]


def test_a_rank_without_rows_is_refused():
    with pytest.raises(ShapeError, match="5 rows over 4 ranks of 2"):
        Shards.even(5, 4)


def test_needs_exchange():
    assert not needs_exchange(DilatedPattern([4, 8], [1, 2]), Shards(32, 8, 4))
    assert needs_exchange(DilatedPattern([4, 16], [1, 2]), Shards(32, 8, 4))
    assert needs_exchange(DilatedPattern([6], [1]), Shards(32, 8, 4))
    assert not needs_exchange(DilatedPattern([6], [1]), Shards(32, 32, 1))


@pytest.mark.parametrize("seed", range(40))
def test_without_exchange_no_rank_shares_a_segment(seed):
    case = random_case(seed, 1 + seed % 4)
    for start, stop in ((0, case.shards.total_rows), (12, case.shards.total_rows + 12)):
        shards = Shards(stop + 24 * (start > 0), case.shards.rows_per_rank, case.shards.num_ranks, start, stop)
        windows = [shards.window(rank) for rank in range(shards.num_ranks)]
        edges = [list(edge_segments(case.pattern, *window, shards.total_rows)) for window in windows]
        assert needs_exchange(case.pattern, shards) == any(edges)


def test_a_chunk_outside_its_sequence_is_refused():
    with pytest.raises(ShapeError, match=r"rows \[8, 20\) of 16"):
        Shards(16, 12, 1, 8, 20)
