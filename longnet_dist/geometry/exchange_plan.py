"""Which sparse rows each rank sends to which, in integers only.

A segment that crosses the edge of a rank's slice is *shared*: every rank that it touches needs the rows that the others
keep in it; in a causal model only those of earlier ranks, and where overlaps are merged only those of its first half,
which only ranks behind that half need (``halves``: ``overlap.first_halves``). A segment that goes on behind the chunk
is needed by all ranks, for the chunks that follow. The order of rows in a message follows from integers that both ends
know: by peer, then segment, then global row, then head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import Segment, Shards, edge_segments, open_segments, shared_segments

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ExchangePlan:
    """What one rank sends, receives and holds in the exchange of one layer.

    A *record* is one (row, head): its key and its value. A *slot* is a place for a record in the compact buffer of a
    segment: slot ``i·Hkv + h`` is row ``i`` of head ``h``.

    Attributes:
        segments: the segments whose rows this rank holds, by branch and index, each up to the last row it can hold.
        send_places: ``local row · Hkv + head`` of each record sent, by destination.
        send_counts: records for each rank of the sequence group.
        receive_segments: place in ``segments`` of each record received, by source.
        receive_slots: slot in that segment's buffer of each record received.
        receive_counts: records from each rank.
    """

    segments: tuple[Segment, ...]
    send_places: Integers
    send_counts: tuple[int, ...]
    receive_segments: Integers
    receive_slots: Integers
    receive_counts: tuple[int, ...]


@lru_cache(maxsize=64)
def plan_exchange(
    pattern: DilatedPattern, shards: Shards, rank: int, kv_heads: int, causal: bool, halves: tuple[int, ...] = ()
) -> ExchangePlan:
    """The plan of ``rank``: made from integers alone, so that each rank makes its own and all fit together.

    ``halves`` is for a causal model and a chunk that is the whole sequence.
    """
    empty = np.empty(0, np.int64)
    window = shards.window(rank)

    send: list[tuple[Integers, Integers]] = [(empty, empty)]
    for segment in edge_segments(pattern, *window, shards.total_rows):
        last, _ = segment.exchange_bounds(halves)
        rows, heads = kept_records(pattern, segment, kv_heads, *_overlap(segment.start, last, window))
        peers = np.array(_receivers(segment, shards, rank, causal, halves), np.int64)
        places = (rows - window[0]) * kv_heads + heads
        send.append((np.repeat(peers, len(places)), np.tile(places, len(peers))))
    peers, all_places = map(np.concatenate, zip(*send, strict=True))
    order = np.argsort(peers, kind="stable")

    segments = buffered_segments(pattern, shards, rank, causal, halves)
    receive: list[tuple[Integers, Integers, Integers]] = [(empty, empty, empty)]
    for number, segment in enumerate(segments):
        kept, kept_heads = kept_records(
            pattern, segment, kv_heads, *_overlap(segment.start, segment.stop, (shards.start, shards.stop))
        )
        slots = (kept - segment.start) // segment.dilation_rate * kv_heads + kept_heads
        sources = (kept - shards.start) // shards.rows_per_rank
        receive.append((sources, np.full(len(kept), number, np.int64), slots))
    sources, numbers, all_slots = map(np.concatenate, zip(*receive, strict=True))
    arrival = np.argsort(sources, kind="stable")
    return ExchangePlan(
        segments,
        all_places[order],
        tuple(np.bincount(peers, minlength=shards.num_ranks).tolist()),
        numbers[arrival],
        all_slots[arrival],
        tuple(np.bincount(sources, minlength=shards.num_ranks).tolist()),
    )


def group_by_place(places: Integers) -> tuple[Integers, Integers, Integers]:
    """Group records by their place; return ``(places, order, starts)`` as ``comm.records.torch.RecordGroups`` has them.

    Args:
        places: (records,) place of each record; several may have the same.
    """
    order = np.argsort(places, kind="stable")
    distinct, starts = np.unique(places[order], return_index=True)
    return distinct, order, np.append(starts, len(places))


def buffered_segments(
    pattern: DilatedPattern, shards: Shards, rank: int, causal: bool, halves: tuple[int, ...] = ()
) -> tuple[Segment, ...]:
    """The segments whose rows ``rank`` holds: those its own window shares, and those that go on behind the chunk."""
    shared = shared_segments(pattern, *shards.window(rank), shards.total_rows, causal, halves)
    open_ones = open_segments(pattern, shards.stop, shards.total_rows)
    held = {(s.branch, s.index): s for s in (*shared, *open_ones)}  # of an open segment, all of it
    return tuple(held[key] for key in sorted(held))


def _receivers(segment: Segment, shards: Shards, rank: int, causal: bool, halves: tuple[int, ...]) -> range:
    """The ranks that need what ``rank`` keeps in the segment; itself too if its own window takes it from a buffer."""
    if segment.stop > shards.stop:
        return range(shards.num_ranks)
    last = shards.rank_of(segment.stop - 1)
    if causal:
        _, needing = segment.exchange_bounds(halves)
        first = max(rank if segment.start < shards.window(rank)[0] else rank + 1, shards.rank_of(needing))
        return range(first, last + 1) if needing < segment.stop else range(0)
    return range(shards.rank_of(segment.start), last + 1)


def _overlap(start: int, stop: int, window: tuple[int, int]) -> tuple[int, int]:
    return max(start, window[0]), min(stop, window[1])


def kept_records(
    pattern: DilatedPattern, segment: Segment, kv_heads: int, start: int, stop: int
) -> tuple[Integers, Integers]:
    """Global row and head of every record that a segment keeps among rows ``[start, stop)``, by row, then head."""
    rate = segment.dilation_rate
    offsets = np.array(pattern.offsets(pattern.branches[segment.branch], kv_heads), np.int64)
    heads = np.argsort(offsets, kind="stable")  # so that a block of r rows is already ordered by row, then head
    blocks = np.arange((start - segment.start) // rate, -(-(stop - segment.start) // rate), dtype=np.int64)
    rows = segment.start + blocks[:, None] * rate + offsets[heads]
    kept = (rows >= start) & (rows < stop)
    return rows[kept], np.broadcast_to(heads, rows.shape)[kept]
