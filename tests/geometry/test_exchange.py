import numpy as np
import pytest

from longnet_dist.geometry.exchange import plan_exchange
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import Shards, shared_segments
from tests.cases import random_case


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("in_a_stream", [False, True])
def test_every_slot_receives_exactly_its_record(ranks, seed, in_a_stream):
    """Deliver (global row, head) labels by the plans: each slot must get the row that its place in the buffer means."""
    case = random_case(seed, ranks)
    shards, pattern, kv_heads, causal = case.shards, case.pattern, case.k.shape[2], case.causal
    if in_a_stream:  # the same rows as a chunk in the middle of a longer causal sequence
        start, total = 13, shards.total_rows
        shards, causal = Shards(start + total + 17, shards.rows_per_rank, ranks, start, start + total), True
    plans = [plan_exchange(pattern, shards, rank, kv_heads, causal) for rank in range(ranks)]
    mail = {}
    for rank, plan in enumerate(plans):
        edges = np.cumsum(plan.send_counts)[:-1]
        rows, heads = np.divmod(plan.send_places, kv_heads)
        labels = np.stack([rows + shards.window(rank)[0], heads], axis=1)
        for target, part in enumerate(np.split(labels, edges)):
            mail[rank, target] = part
    for rank, plan in enumerate(plans):
        received = np.concatenate([mail[source, rank] for source in range(ranks)])
        assert [len(mail[source, rank]) for source in range(ranks)] == list(plan.receive_counts)
        arrivals = list(zip(plan.receive_segments.tolist(), plan.receive_slots.tolist(), strict=True))
        assert len(set(arrivals)) == len(arrivals)
        buffers = dict(zip(arrivals, map(tuple, received.tolist()), strict=True))
        for number, segment in enumerate(plan.segments):
            offsets = pattern.offsets(pattern.branches[segment.branch], kv_heads)
            for index in range(segment.compact_rows):
                for head, offset in enumerate(offsets):
                    row = segment.start + offset + index * segment.dilation_rate
                    held = shards.start <= row < min(segment.stop, shards.stop)
                    assert buffers.pop((number, index * kv_heads + head), None) == ((row, head) if held else None)
        assert not buffers
        needed = shared_segments(pattern, *shards.window(rank), shards.total_rows, causal)
        assert {(s.branch, s.index) for s in needed} <= {(s.branch, s.index) for s in plan.segments}


@pytest.mark.parametrize("ranks", [8, 64, 1024, 4096])
def test_received_bytes_do_not_grow_with_the_sequence(ranks):
    received = []
    for rows in (2**24, 2**27, 2**30):
        pattern = DilatedPattern.geometric(2048, rows)
        received.append(len(plan_exchange(pattern, Shards.even(rows, ranks), ranks - 1, 12, True).receive_slots))
    assert len(set(received)) == 1


@pytest.mark.parametrize("ranks", [8, 64, 1024, 4096])
def test_both_ends_agree_at_a_billion_rows(ranks):
    pattern = DilatedPattern.geometric(2048, 2**30)
    shards = Shards.even(2**30, ranks)
    sampled = sorted({0, 1, ranks // 3, ranks // 2, ranks - 2, ranks - 1})
    plans = {rank: plan_exchange(pattern, shards, rank, 12, True) for rank in sampled}
    for source in sampled:
        for target in sampled:
            assert plans[source].send_counts[target] == plans[target].receive_counts[source]
