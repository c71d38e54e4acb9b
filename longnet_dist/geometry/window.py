"""Which part of each branch a window of query rows computes, in integers only.

A *window* is the query rows ``[start, stop)`` of a global sequence of ``total_rows`` rows: a whole sequence, a rank's
slice, a chunk of a stream, or one decoded row. Its *pieces* are all a kernel needs to know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from longnet_dist.errors import ShapeError
from longnet_dist.geometry.pattern import DilatedPattern, kept_rows


@dataclass(frozen=True, slots=True)
class Shards:
    """A chunk of a sequence cut into contiguous slices, one a rank; usually the chunk is the whole sequence.

    Every rank holds ``rows_per_rank`` rows of the chunk, the last what is left.

    Attributes:
        total_rows: rows of the whole sequence.
        rows_per_rank: rows of every rank but the last.
        num_ranks: ranks that share the chunk.
        start: first row of the chunk.
        stop: end (exclusive) of the chunk; the end of the sequence if not given.

    Raises:
        ShapeError: the last rank would hold no row, or the chunk leaves the sequence.
    """

    total_rows: int
    rows_per_rank: int
    num_ranks: int
    start: int = 0
    stop: int = -1

    def __post_init__(self) -> None:
        if self.stop == -1:
            object.__setattr__(self, "stop", self.total_rows)
        if not 0 <= self.start < self.stop <= self.total_rows:
            raise ShapeError(
                f"a chunk must lie in its sequence and hold a row, but rows [{self.start}, {self.stop}) of "
                f"{self.total_rows} do not"
            )
        rows = self.stop - self.start
        last = rows - (self.num_ranks - 1) * self.rows_per_rank
        if not 1 <= last <= self.rows_per_rank:
            raise ShapeError(
                f"every rank must hold the same number of rows and the last at least 1 and no more than the others, "
                f"but {rows} rows over {self.num_ranks} ranks of {self.rows_per_rank} leave {last} for the last; "
                f"use a longer sequence or fewer sequence ranks"
            )

    @classmethod
    def even(cls, total_rows: int, num_ranks: int, start: int = 0, stop: int = -1) -> Shards:
        """The slices of ``ceil(rows / num_ranks)`` rows."""
        rows = (total_rows if stop == -1 else stop) - start
        return cls(total_rows, -(-rows // num_ranks), num_ranks, start, stop)

    def window(self, rank: int) -> tuple[int, int]:
        """Global rows ``[start, stop)`` of ``rank``."""
        start = self.start + rank * self.rows_per_rank
        return start, min(start + self.rows_per_rank, self.stop)

    def rank_of(self, row: int) -> int:
        """The rank that holds a global row of the chunk."""
        return (row - self.start) // self.rows_per_rank


@dataclass(frozen=True, slots=True)
class Segment:
    """Segment ``index`` of a branch: global rows ``[start, stop)``."""

    branch: int
    index: int
    start: int
    stop: int
    dilation_rate: int

    @property
    def compact_rows(self) -> int:
        """Rows of the compact key buffer: the most that any head keeps."""
        return kept_rows(self.stop - self.start, 0, self.dilation_rate)

    def exchange_bounds(self, halves: tuple[int, ...]) -> tuple[int, int]:
        """End of the rows whose keys a causal model needs in other windows, and the first row whose query needs them.

        Both are the middle where the branch has one of the ``halves`` (``overlap.first_halves``).
        """
        half = halves[self.branch] if halves else 0
        middle = min(self.start + half, self.stop)
        return (middle, middle) if half else (self.stop, self.start)


@dataclass(frozen=True, slots=True)
class Piece:
    """One kernel call: the query rows ``[query_start, query_stop)`` of consecutive segments of a branch.

    All rows are global. Row ``x`` of the queries stands at ``x - window_start`` in the query buffer. With
    ``compact`` false, keys stand in a buffer of the same rows as the queries; with ``compact`` true the piece lies in
    one segment and key ``i`` of a head stands at row ``i`` of that segment's compact buffer.

    In segment ``s`` and for head offset ``o``, query and key ``j`` are both global row ``s·w + o + j·r``; a causal
    query ``j`` sees the keys ``i <= j``.

    Attributes:
        key_stop: end (exclusive) of the rows whose keys are given, at most the end of the last segment.
        half, overlap_rates: see ``overlap.Overlap``; with ``half`` the queries behind the first ``half`` rows of a
            segment see all keys in them and no others, with ``-half`` those in them all keys behind them. Only kernels
            that merge overlaps are given such pieces.
    """

    branch: int
    segment_length: int
    dilation_rate: int
    first_segment: int
    num_segments: int
    window_start: int
    query_start: int
    query_stop: int
    key_stop: int
    compact: bool
    half: int = 0
    overlap_rates: tuple[int, ...] = ()

    def runs(self) -> Iterator[tuple[int, int]]:
        """``(first_segment, num_segments)`` of stretches of equal segments: the full ones, then a short last one."""
        full = (self.key_stop - self.first_segment * self.segment_length) // self.segment_length
        full = min(full, self.num_segments) if not self.compact else 0
        if full:
            yield self.first_segment, full
        if full < self.num_segments:
            yield self.first_segment + full, self.num_segments - full

    def queries(self, segment: int, offset: int) -> tuple[int, int, int]:
        """``(first_row, count, first_index)`` of a head's queries in ``segment``: buffer row, number, index ``j``."""
        start = segment * self.segment_length + offset
        first = kept_rows(max(self.query_start - start, 0), 0, self.dilation_rate)
        stop = kept_rows(min(self.query_stop, (segment + 1) * self.segment_length) - start, 0, self.dilation_rate)
        return start + first * self.dilation_rate - self.window_start, max(0, stop - first), first

    def keys(self, segment: int, offset: int) -> tuple[int, int, int]:
        """``(first_row, count, step)`` of a head's keys in ``segment``: buffer row, number, rows between neighbours."""
        start = segment * self.segment_length
        count = kept_rows(min(self.key_stop, start + self.segment_length) - start, offset, self.dilation_rate)
        return (0, count, 1) if self.compact else (start + offset - self.window_start, count, self.dilation_rate)


@lru_cache(maxsize=512)
def dense_pieces(pattern: DilatedPattern, start: int, stop: int, total_rows: int, causal: bool) -> tuple[Piece, ...]:
    """The pieces of window ``[start, stop)`` whose keys are all rows of the window itself, at most one a branch.

    These are the segments that lie inside the window; in a causal model also one that starts inside and ends behind it.
    """
    pieces = []
    for number, branch in enumerate(pattern):
        width = branch.segment_length
        first = -(-start // width)
        last = -(-stop // width) if causal or stop == total_rows else stop // width
        if first < last:
            rows = (first * width, min(last * width, stop))
            pieces.append(
                Piece(number, width, branch.dilation_rate, first, last - first, start, *rows, rows[1], compact=False)
            )
    return tuple(pieces)


def edge_segments(pattern: DilatedPattern, start: int, stop: int, total_rows: int) -> Iterator[Segment]:
    """The segments that cross an edge of window ``[start, stop)``, at most two a branch, by branch and index."""
    for number, branch in enumerate(pattern):
        width = branch.segment_length
        for index in sorted({start // width, (stop - 1) // width}):
            first, last = index * width, min((index + 1) * width, total_rows)
            if first < start or last > stop:
                yield Segment(number, index, first, last, branch.dilation_rate)


def open_segments(pattern: DilatedPattern, row: int, total_rows: int) -> tuple[Segment, ...]:
    """The segments that begin before ``row`` and go on with it, at most one a branch."""
    segments = []
    for number, branch in enumerate(pattern):
        width = branch.segment_length
        first = (row - 1) // width * width
        last = min(first + width, total_rows)
        if row > 0 and last > row:
            segments.append(Segment(number, first // width, first, last, branch.dilation_rate))
    return tuple(segments)


@lru_cache(maxsize=512)
def shared_segments(
    pattern: DilatedPattern, start: int, stop: int, total_rows: int, causal: bool, halves: tuple[int, ...] = ()
) -> tuple[Segment, ...]:
    """The segments for which window ``[start, stop)`` needs keys of other windows, by branch and index.

    In a causal model these began before the window, and end with it, since later keys are never seen, or with the keys
    that are needed at all (:meth:`Segment.exchange_bounds`).
    """
    segments = edge_segments(pattern, start, stop, total_rows)
    if not causal:
        return tuple(segments)
    began = ((s, *s.exchange_bounds(halves)) for s in segments if s.start < start)
    return tuple(replace(s, stop=min(last, stop)) for s, last, first in began if first < min(s.stop, stop))


def compact_piece(pattern: DilatedPattern, segment: Segment, start: int, stop: int) -> Piece:
    """The piece that computes, in window ``[start, stop)``, the queries of a shared segment from its compact keys."""
    width = pattern.branches[segment.branch].segment_length
    return Piece(
        segment.branch,
        width,
        segment.dilation_rate,
        segment.index,
        1,
        start,
        max(start, segment.start),
        min(stop, (segment.index + 1) * width),
        segment.stop,
        compact=True,
    )


def needs_exchange(pattern: DilatedPattern, shards: Shards) -> bool:
    """Whether any segment crosses an edge of a rank's slice inside the sequence: the same answer on every rank."""
    edges = [shards.start, shards.stop]
    if shards.num_ranks > 1:
        edges.append(shards.start + shards.rows_per_rank)
    if shards.num_ranks > 2:
        edges.append(shards.start + 2 * shards.rows_per_rank)  # the others follow at the same distance
    return any(edge < shards.total_rows and edge % branch.segment_length for edge in edges for branch in pattern)
