import random

import numpy as np
import pytest

from longnet_dist.geometry.exchange_plan import plan_exchange
from longnet_dist.geometry.overlap import first_halves
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import Shards, compact_piece, dense_pieces, shared_segments
from tests.cases import random_case


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["whole", "in a stream", "merged"])
def test_every_slot_receives_exactly_its_record(ranks, seed, kind):
    """Send (global row, head) labels by the plans; each slot must get the row and head that it is for."""
    case = random_case(seed, ranks)
    shards, pattern, kv_heads, causal = case.shards, case.pattern, case.k.shape[2], case.causal
    if kind == "in a stream":  # the same rows as a chunk in the middle of a longer causal sequence
        start, total = 13, shards.total_rows
        shards, causal = Shards(start + total + 17, shards.rows_per_rank, ranks, start, start + total), True
    halves = ()
    if kind == "merged":
        pattern, causal = random_chain(random.Random(seed), shards.total_rows), True
        halves = first_halves(pattern)
        assert any(halves)
    plans = [plan_exchange(pattern, shards, rank, kv_heads, causal, halves) for rank in range(ranks)]
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
        needed = shared_segments(pattern, *shards.window(rank), shards.total_rows, causal, halves)
        assert {(s.branch, s.index) for s in needed} <= {(s.branch, s.index) for s in plan.segments}


def random_chain(draw, rows):
    """Return a pattern whose branches overlap, with segments shorter and longer than ``rows``."""
    width, rates = 2 * draw.randint(1, max(1, rows // 4)), [1]
    for _ in range(draw.randint(1, 4)):
        rates.append(rates[-1] * draw.choice([1, 2]))
    width += -width % rates[-1]
    return DilatedPattern([width << branch for branch in range(len(rates))], rates)


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(8))
def test_merged_ranks_hold_the_keys_of_all_their_pairs_and_no_others(ranks, seed):
    """A branch with halves needs only keys of the first half, and only on ranks with queries behind it."""
    draw = random.Random(100 * seed + ranks)
    rows = draw.randint(20, 200)
    shards = Shards.even(ranks * (rows // ranks), ranks)
    pattern = random_chain(draw, shards.total_rows)
    halves = first_halves(pattern)
    for rank in range(ranks):
        start, stop = shards.window(rank)
        held = {(s.branch, s.index): s for s in plan_exchange(pattern, shards, rank, 3, True, halves).segments}
        for number, (branch, half) in enumerate(zip(pattern, halves, strict=True)):
            for index in range(-(-shards.total_rows // branch.segment_length)):
                first = index * branch.segment_length
                last = min(first + branch.segment_length, shards.total_rows)
                queries = range(max(start, first + half), min(stop, last))
                segment = held.pop((number, index), None)
                if first < start and queries:
                    assert (segment.start, segment.stop) == (first, min(first + half, last) if half else queries.stop)
                else:
                    assert segment is None
        assert not held


def test_where_overlaps_are_merged_ranks_receive_less():
    pattern, shards = DilatedPattern.geometric(2048, 2**20), Shards.even(2**20, 8)
    halves = first_halves(pattern)
    whole, half = (
        [sum(plan_exchange(pattern, shards, rank, 12, True, x).receive_counts) for rank in range(8)]
        for x in ((), halves)
    )
    assert sum(half) < 0.65 * sum(whole)
    assert max(half) < 0.7 * max(whole)


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


def sent_rows(plan, shards, rank, target, kv_heads):
    """Return the global row and the head of every record that ``rank`` sends to ``target``, in order."""
    first = sum(plan.send_counts[:target])
    rows, heads = np.divmod(plan.send_places[first : first + plan.send_counts[target]], kv_heads)
    return np.stack([rows + shards.window(rank)[0], heads])


def expected_rows(plan, pattern, source, kv_heads):
    """Return the global row and the head of each slot that ``source`` fills, in the order of arrival."""
    first = sum(plan.receive_counts[:source])
    part = slice(first, first + plan.receive_counts[source])
    index, heads = np.divmod(plan.receive_slots[part], kv_heads)
    segments = [plan.segments[number] for number in plan.receive_segments[part]]
    offsets = [pattern.offsets(pattern.branches[s.branch], kv_heads) for s in segments]
    rows = [
        s.start + offset[head] + i * s.dilation_rate
        for s, offset, i, head in zip(segments, offsets, index.tolist(), heads.tolist(), strict=True)
    ]
    return np.stack([np.array(rows, np.int64), heads])


def keys_found(pattern, shards, plan, rank, row, head, branch, kv_heads, causal):
    """Return the global rows of the keys that a query sees in a branch by the pieces of ``rank``, in order."""
    window = shards.window(rank)
    width, rate = pattern.segment_lengths[branch], pattern.dilation_rates[branch]
    offset = pattern.offsets(pattern.branches[branch], kv_heads)[head]
    shared = shared_segments(pattern, *window, shards.total_rows, causal)
    pieces = [*dense_pieces(pattern, *window, shards.total_rows, causal)]
    pieces += [compact_piece(pattern, segment, *window) for segment in shared]
    found = []
    for piece in pieces:
        inside = piece.branch == branch and piece.query_start <= row < piece.query_stop
        first_row, count, first_index = piece.queries(row // width, offset)
        step, rest = divmod(row - window[0] - first_row, rate)
        if not inside or rest or not 0 <= step < count:
            continue
        start, count, distance = piece.keys(row // width, offset)
        seen = np.arange(min(count, first_index + step + 1) if causal else count)
        if piece.compact:
            held = [(s.branch, s.index) for s in plan.segments]
            slots = plan.receive_slots[plan.receive_segments == held.index((branch, row // width))]
            assert set((seen * kv_heads + head).tolist()) <= set(slots.tolist())
            found.append(row // width * width + offset + (start + seen * distance) * rate)
        else:
            found.append(window[0] + start + seen * distance)
    assert len(found) <= 1
    return found[0].tolist() if found else []


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("ranks", "rows"), [(8, 2**20), (64, 2**24 - 5), (1024, 2**27 + 77), (4096, 2**30)])
def test_sampled_queries_find_exactly_the_keys_of_the_definition(ranks, rows, causal):
    """A query sees its keys through the pieces of its rank, and its rank receives those of other ranks."""
    rng, kv_heads = random.Random(ranks), 3
    pattern, shards = DilatedPattern.geometric(2048, rows), Shards.even(rows, ranks)
    for rank in sorted({0, ranks // 2 + 1, ranks - 1}):
        plan = plan_exchange(pattern, shards, rank, kv_heads, causal)
        sources = np.flatnonzero(plan.receive_counts).tolist()
        for source in rng.sample(sources, min(2, len(sources))):
            owner = plan_exchange(pattern, shards, source, kv_heads, causal)
            sent = sent_rows(owner, shards, source, rank, kv_heads)
            np.testing.assert_array_equal(sent, expected_rows(plan, pattern, source, kv_heads))
        start, stop = shards.window(rank)
        for sample in (start, stop - 1, *(rng.randrange(start, stop) for _ in range(4))):
            for branch, (width, rate) in enumerate(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)):
                head = rng.randrange(kv_heads)
                first = sample // width * width + head % rate
                kept = sample - (sample - first) % rate  # a row that the branch keeps, mostly
                row = kept if kept >= max(start, first) and sample % 3 else sample
                end = row + 1 if causal else min((row // width + 1) * width, rows)
                wanted = list(range(first, end, rate)) if (row - first) % rate == 0 and row >= first else []
                found = keys_found(pattern, shards, plan, rank, row, head, branch, kv_heads, causal)
                assert found == wanted, (rank, row, head, branch)
