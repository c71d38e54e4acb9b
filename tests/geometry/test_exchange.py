import numpy as np
import pytest

from longnet_dist.geometry.exchange import plan_exchange
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import Shards
from tests.cases import random_case


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(12))
def test_every_slot_receives_exactly_its_record(ranks, seed):
    """Deliver (global row, head) labels by the plans: each slot must get the row that its place in the buffer means."""
    case = random_case(seed, ranks)
    shards, pattern, kv_heads, causal = case.shards, case.pattern, case.k.shape[2], case.causal
    plans = [plan_exchange(pattern, shards, rank, kv_heads, causal) for rank in range(ranks)]
    mail = {}
    for rank, plan in enumerate(plans):
        edges = np.cumsum(plan.send_counts)[:-1]
        labels = np.stack([plan.send_rows + shards.window(rank)[0], plan.send_heads], axis=1)
        for target, part in enumerate(np.split(labels, edges)):
            mail[rank, target] = part
    for rank, plan in enumerate(plans):
        received = np.concatenate([mail[source, rank] for source in range(ranks)])
        assert [len(mail[source, rank]) for source in range(ranks)] == list(plan.receive_counts)
        slots = np.full((plan.num_slots, 2), -1)
        slots[plan.slots] = received
        assert len(set(plan.slots.tolist())) == len(plan.slots)
        for segment, first in zip(plan.segments, plan.first_slots, strict=True):
            offsets = pattern.offsets(pattern.branches[segment.branch], kv_heads)
            for index in range(segment.compact_rows):
                for head, offset in enumerate(offsets):
                    row = segment.start + offset + index * segment.dilation_rate
                    expected = (row, head) if row < segment.stop else (-1, -1)
                    assert tuple(slots[first + index * kv_heads + head]) == expected


@pytest.mark.parametrize("ranks", [8, 64, 1024, 4096])
def test_received_bytes_do_not_grow_with_the_sequence(ranks):
    received = []
    for rows in (2**24, 2**27, 2**30):
        pattern = DilatedPattern.geometric(2048, rows)
        received.append(len(plan_exchange(pattern, Shards.even(rows, ranks), ranks - 1, 12, True).slots))
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
