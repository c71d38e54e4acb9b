"""Which sparse rows each rank sends to which, in integers only.

A segment that crosses the edge of a rank's slice is *shared* by the ranks it touches. Every one of them needs the rows
that the others keep in it (a causal model: only those of earlier ranks). The order of rows in a message follows from
integers that both ends know: by peer, then segment, then global row, then head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import Segment, Shards, edge_segments, shared_segments

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ExchangePlan:
    """What one rank sends and receives in the exchange of one layer.

    A *record* is one (row, head): its key and its value. A *slot* is a place for a record in the compact buffers, which
    stand one behind the other: slot ``first + i·Hkv + h`` is row ``i`` of head ``h`` of a segment.

    Attributes:
        segments: the rank's shared segments, in the order of their compact buffers.
        first_slots: first slot of each segment's buffer.
        num_slots: slots of all buffers together.
        send_rows: local row of each record sent, by destination.
        send_heads: head of each record sent.
        send_counts: records for each rank of the sequence group.
        slots: slot of each record received, by source.
        receive_counts: records from each rank.
    """

    segments: tuple[Segment, ...]
    first_slots: tuple[int, ...]
    num_slots: int
    send_rows: Integers
    send_heads: Integers
    send_counts: tuple[int, ...]
    slots: Integers
    receive_counts: tuple[int, ...]


@lru_cache(maxsize=64)
def plan_exchange(pattern: DilatedPattern, shards: Shards, rank: int, kv_heads: int, causal: bool) -> ExchangePlan:
    """The plan of ``rank``: made from integers alone, the same on every rank that asks for it."""
    start, stop = shards.window(rank)
    length = shards.rows_per_rank
    empty = np.empty(0, np.int64)

    send: list[tuple[Integers, Integers, Integers]] = [(empty, empty, empty)]
    for segment in edge_segments(pattern, start, stop, shards.total_rows):
        rows, heads = kept_records(pattern, segment, kv_heads, max(start, segment.start), min(stop, segment.stop))
        first_peer = segment.start // length
        if causal:
            first_peer = rank if segment.start < start else rank + 1
        peers = np.arange(first_peer, (segment.stop - 1) // length + 1)
        send.append((np.repeat(peers, len(rows)), np.tile(rows - start, len(peers)), np.tile(heads, len(peers))))

    segments = shared_segments(pattern, start, stop, shards.total_rows, causal)
    receive: list[tuple[Integers, Integers]] = [(empty, empty)]
    first_slots, num_slots = [], 0
    for segment in segments:
        rows, heads = kept_records(pattern, segment, kv_heads, segment.start, segment.stop)
        indices = (rows - segment.start) // segment.dilation_rate
        receive.append((rows // length, num_slots + indices * kv_heads + heads))
        first_slots.append(num_slots)
        num_slots += segment.compact_rows * kv_heads

    peers, rows, heads = map(np.concatenate, zip(*send, strict=True))
    order = np.argsort(peers, kind="stable")
    sources, slots = map(np.concatenate, zip(*receive, strict=True))
    return ExchangePlan(
        segments,
        tuple(first_slots),
        num_slots,
        rows[order],
        heads[order],
        tuple(np.bincount(peers, minlength=shards.num_ranks).tolist()),
        slots[np.argsort(sources, kind="stable")],
        tuple(np.bincount(sources, minlength=shards.num_ranks).tolist()),
    )


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
