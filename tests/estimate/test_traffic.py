import pytest

from longnet_dist.estimate.traffic import exchange_of
from longnet_dist.geometry.exchange_plan import plan_exchange
from longnet_dist.geometry.overlap import first_halves
from tests.estimate.layouts import small_layout


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("rows", [1000, 4096])
@pytest.mark.parametrize("chunk", [None, 420])
@pytest.mark.parametrize("causal", [True, False])
def test_records_are_those_of_the_plan(ranks, rows, chunk, causal):
    if chunk and not causal:
        return
    model = {"segment_lengths": [100, 300, 5000], "dilation_rates": [1, 3, 7], "kv_heads": 2, "causal": causal}
    layout = small_layout(rows, ranks, model=model, train={"chunk_length": chunk})
    rank = ranks - 1 if causal else ranks // 2
    plan = plan_exchange(layout.config.model.pattern, layout.last_chunk, rank, 2, causal)
    counted = exchange_of(layout)
    assert counted.received == sum(plan.receive_counts)
    assert counted.foreign == sum(plan.receive_counts) - plan.receive_counts[rank]
    assert counted.bytes == counted.foreign * 2 * 32 * (2 + 4)
    assert counted.buffered_rows == sum(segment.compact_rows for segment in plan.segments)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_records_where_a_gpu_merges_overlaps(device):
    model = {"segment_lengths": [1024, 2048, 4096], "dilation_rates": [1, 2, 4]}
    layout = small_layout(4096, 4, device, model=model)
    pattern, heads = layout.config.model.pattern, layout.config.model.heads
    halves = first_halves(pattern) if device == "cuda" else ()
    plan = plan_exchange(pattern, layout.last_chunk, 3, heads, True, halves)
    assert exchange_of(layout).received == sum(plan.receive_counts) > 0


def test_aligned_segments_move_nothing():
    assert exchange_of(small_layout(4096, 2)).bytes == 0
    assert exchange_of(small_layout(4096, 1)).received == 0


def test_bytes_do_not_grow_with_the_sequence():
    model = {"segment_lengths": [2**14 + 1, 2**15 + 1], "dilation_rates": [8, 16]}
    assert (
        exchange_of(small_layout(2**20, 4, model=model)).bytes
        < 2**23
        > exchange_of(small_layout(2**30, 4, model=model)).bytes
    )
