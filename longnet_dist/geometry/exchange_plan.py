"""Each rank plans, with integers only, which sparse keys and values it sends to which rank.

A segment that crosses the edge of a rank's slice is *shared*. Every rank that it touches needs the rows that the others
keep in it, with three exceptions:

* in a causal model a rank needs only the rows of earlier ranks;
* where overlaps are merged, only rows of the first half are needed, and only by ranks behind that half (``halves``,
  from ``overlap.first_halves``);
* a segment that continues behind the chunk is needed by all ranks, for the chunks that follow.

A message contains records only, no indices: both ends derive the same order from the same integers (peer, then segment,
then global row, then head).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from longnet_dist.caches import bounded_cache
from longnet_dist.geometry.documents import Documents
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import Segment, Shards, edge_segments, open_segments, shared_segments

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ExchangePlan:
    """An ExchangePlan says what one rank sends, receives and buffers in the exchange of one layer.

    A *record* is the key and the value of one row and one head. A *slot* is the place of a record in the compact buffer
    of a segment: slot ``i·Hkv + h`` is row ``i`` of head ``h``. All arrays are int64.

    Attributes:
        segments: the segments that this rank buffers, ordered by branch, then index, each up to the last row that it
            can need.
        send_places: (sent,) ``local row · Hkv + head`` of each record sent, by destination.
        send_counts: number of records for each rank of the sequence group.
        receive_segments: (received,) index in ``segments`` of each record received, by source.
        receive_slots: (received,) slot of each record received in the buffer of its segment.
        receive_counts: number of records from each rank of the sequence group.
    """

    segments: tuple[Segment, ...]
    send_places: Integers
    send_counts: tuple[int, ...]
    receive_segments: Integers
    receive_slots: Integers
    receive_counts: tuple[int, ...]


@bounded_cache(maxsize=64)
def plan_exchange(
    pattern: DilatedPattern,
    shards: Shards,
    rank: int,
    kv_heads: int,
    causal: bool,
    halves: tuple[int, ...] = (),
    documents: Documents | None = None,
) -> ExchangePlan:
    """Plan the exchange of ``rank``; the plans of all ranks fit together without communication.

    Args:
        pattern: the branches.
        shards: the slices of the chunk.
        rank: index of the rank in the sequence group.
        kv_heads: key/value heads ``Hkv``.
        causal: whether a row sees only itself and earlier rows.
        halves: ``overlap.first_halves`` of the pattern where overlaps are merged, for a causal model and a chunk that
            is the whole sequence; else empty.
    """
    window = shards.window(rank)
    # A list for each peer keeps the order of segments, rows and heads, as the receiver expects it.
    sent: list[list[Integers]] = [[] for _ in range(shards.num_ranks)]
    for segment in edge_segments(pattern, *window, shards.total_rows, documents):
        peers = _receivers(segment, shards, rank, causal, halves)
        if not peers:
            continue
        last, _ = segment.exchange_bounds(halves)
        places = _Records.of(pattern, segment, kv_heads).places(*_overlap(segment.start, last, window))
        places -= window[0] * kv_heads
        for peer in peers:
            sent[peer].append(places)

    segments = buffered_segments(pattern, shards, rank, causal, halves, documents)
    received: list[list[Integers]] = [[] for _ in sent]
    numbers: list[list[int]] = [[] for _ in sent]
    for number, segment in enumerate(segments):
        records = _Records.of(pattern, segment, kv_heads)
        rows = _overlap(segment.start, segment.stop, (shards.start, shards.stop))
        for source in range(shards.rank_of(rows[0]), shards.rank_of(rows[1] - 1) + 1):
            received[source].append(records.slots(*_overlap(*rows, shards.window(source))))
            numbers[source].append(number)
    return ExchangePlan(
        segments,
        _concatenated(sent),
        _lengths(sent),
        _repeated(numbers, received),
        _concatenated(received),
        _lengths(received),
    )


def _concatenated(lists: list[list[Integers]]) -> Integers:
    return np.concatenate([np.empty(0, np.int64), *chain.from_iterable(lists)])


def _repeated(numbers: list[list[int]], lists: list[list[Integers]]) -> Integers:
    """Return each number as often as its array in ``lists`` is long."""
    lengths = [len(array) for array in chain.from_iterable(lists)]
    return np.repeat(np.array([*chain.from_iterable(numbers)], np.int64), np.array(lengths, np.int64))


def _lengths(lists: list[list[Integers]]) -> tuple[int, ...]:
    return tuple(sum(map(len, parts)) for parts in lists)


@bounded_cache(maxsize=64)
def plan_within(
    pattern: DilatedPattern, shards: Shards, kv_heads: int, causal: bool, documents: Documents | None = None
) -> ExchangePlan:
    """Plan what one device hands itself where it has all keys of a sequence, but queries of its last rows alone.

    Unlike those of :func:`plan_exchange`, ``send_places`` count rows of the sequence. The arguments are those of
    :func:`plan_exchange`.
    """
    segments = shared_segments(pattern, *shards.window(0), shards.total_rows, causal, (), documents)
    places, numbers, slots = ([np.empty(0, np.int64)] for _ in range(3))
    for number, segment in enumerate(segments):
        records = _Records.of(pattern, segment, kv_heads)
        places.append(records.places(segment.start, segment.stop))
        slots.append(records.slots(segment.start, segment.stop))
        numbers.append(np.full(len(slots[-1]), number, np.int64))
    sent, number_of, slot_of = map(np.concatenate, (places, numbers, slots))
    return ExchangePlan(segments, sent, (len(sent),), number_of, slot_of, (len(sent),))


def group_by_place(places: Integers) -> tuple[Integers, Integers, Integers]:
    """Group records by their place; return ``(places, order, starts)`` as ``comm.records.torch.RecordGroups`` has them.

    Args:
        places: (records,) place of each record; several may have the same.
    """
    order = np.argsort(places, kind="stable")
    distinct, starts = np.unique(places[order], return_index=True)
    return distinct, order, np.append(starts, len(places))


def buffered_segments(
    pattern: DilatedPattern,
    shards: Shards,
    rank: int,
    causal: bool,
    halves: tuple[int, ...] = (),
    documents: Documents | None = None,
) -> tuple[Segment, ...]:
    """Return the segments that ``rank`` buffers: those that its window shares, and those that are open at the end.

    An open segment, which continues behind the chunk, is buffered whole, since later chunks may need all of it. The
    arguments are those of :func:`plan_exchange`.
    """
    shared = shared_segments(pattern, *shards.window(rank), shards.total_rows, causal, halves, documents)
    open_ones = open_segments(pattern, shards.stop, shards.total_rows, documents)
    held = {(s.branch, s.index): s for s in (*shared, *open_ones)}  # open ones last, since they are whole
    return tuple(held[key] for key in sorted(held))


def _receivers(segment: Segment, shards: Shards, rank: int, causal: bool, halves: tuple[int, ...]) -> range:
    """Return the ranks that need what ``rank`` keeps in the segment.

    They include ``rank`` itself if its own queries read the segment from the compact buffer.
    """
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


class _Records(NamedTuple):
    """The records of a segment, ordered by row, then head.

    Attributes:
        start: first row of the segment.
        rate: its dilation rate ``r``.
        offsets: offsets of the heads, ascending, ``(Hkv,)``.
        heads: the heads that have them, ``(Hkv,)``. With them, each block of ``r`` rows is in order.
        ascending: the offsets again, in which a place is found in less time than in an array.
    """

    start: int
    rate: int
    offsets: Integers
    heads: Integers
    ascending: tuple[int, ...]

    @classmethod
    def of(cls, pattern: DilatedPattern, segment: Segment, kv_heads: int) -> _Records:
        return cls(segment.start, segment.dilation_rate, *_heads_by_offset(pattern, segment.branch, kv_heads))

    def places(self, start: int, stop: int) -> Integers:
        """Return ``global row · Hkv + head`` of the records in rows ``[start, stop)``, ``(records,)``."""
        # Row start + i·r + o of head h, for block i.
        in_block = (self.start + self.offsets) * len(self.heads) + self.heads
        return self._in_rows(start, stop, self.rate * len(self.heads), in_block)

    def slots(self, start: int, stop: int) -> Integers:
        """Return the slots ``i·Hkv + head`` of the records in rows ``[start, stop)``, ``(records,)``."""
        return self._in_rows(start, stop, len(self.heads), self.heads)

    def _in_rows(self, start: int, stop: int, step: int, in_block: Integers) -> Integers:
        first, last = self._before(start), self._before(stop)
        blocks = np.arange(first // len(in_block), -(-last // len(in_block)), dtype=np.int64)
        skipped = first // len(in_block) * len(in_block)
        return (blocks[:, None] * step + in_block).ravel()[first - skipped : max(first, last) - skipped]

    def _before(self, row: int) -> int:
        """Return the number of records before a row."""
        block, place = divmod(row - self.start, self.rate)
        return block * len(self.heads) + bisect_left(self.ascending, place)


@bounded_cache(maxsize=512)
def _heads_by_offset(pattern: DilatedPattern, branch: int, kv_heads: int) -> tuple[Integers, Integers, tuple[int, ...]]:
    """Return the offsets of a branch in ascending order, the heads that have them, each (Hkv,), and the offsets."""
    offsets = np.array(pattern.offsets(pattern.branches[branch], kv_heads), np.int64)
    heads = np.argsort(offsets, kind="stable")
    return offsets[heads], heads, tuple(offsets[heads].tolist())
