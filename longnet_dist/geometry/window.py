"""A window of query rows is cut into pieces, one or more for each branch, which describe the work of a kernel.

A *window* is the query rows ``[start, stop)`` of a global sequence of ``total_rows`` rows. It can be a whole sequence,
a rank's slice, a chunk of a stream, or one decoded token: they differ only in these two integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from longnet_dist.caches import bounded_cache
from longnet_dist.errors import ShapeError
from longnet_dist.geometry.documents import Documents, SegmentTable, segment_table
from longnet_dist.geometry.pattern import Branch, DilatedPattern, kept_rows


@dataclass(frozen=True, slots=True)
class Shards:
    """The rows of a chunk are cut into contiguous slices, one for each rank; usually the chunk is the whole sequence.

    Every rank has ``rows_per_rank`` rows of the chunk, except that the last may have fewer.

    Attributes:
        total_rows: rows of the whole sequence.
        rows_per_rank: rows of every rank but the last.
        num_ranks: ranks that share the chunk.
        start: first row of the chunk.
        stop: end (exclusive) of the chunk; the end of the sequence if not given.

    Raises:
        ShapeError: the last rank would have no row, or the chunk is not inside the sequence.
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
        """Cut rows ``[start, stop)`` into slices of ``ceil((stop - start) / num_ranks)`` rows.

        Args:
            total_rows: rows of the whole sequence.
            num_ranks: ranks that share the chunk.
            start: first row of the chunk.
            stop: end (exclusive) of the chunk; the end of the sequence if not given.

        Raises:
            ShapeError: the last rank would have no row.
        """
        rows = (total_rows if stop == -1 else stop) - start
        return cls(total_rows, -(-rows // num_ranks), num_ranks, start, stop)

    def window(self, rank: int) -> tuple[int, int]:
        """Return the global rows ``(start, stop)`` of ``rank``, stop exclusive."""
        start = self.start + rank * self.rows_per_rank
        return start, min(start + self.rows_per_rank, self.stop)

    def rank_of(self, row: int) -> int:
        """Return the rank whose slice contains a global row of the chunk."""
        return (row - self.start) // self.rows_per_rank


@dataclass(frozen=True, slots=True)
class Segment:
    """Segment ``index`` of a branch is the global rows ``[start, stop)``.

    Attributes:
        branch: index of the branch in the pattern.
        index: index of the segment in the branch, or its first row where segments have no common length.
        start: first row.
        stop: end (exclusive); less than the end of the segment where later rows are not needed.
        dilation_rate: ``r`` of the branch.
        lead: rows that the segment lacks at its start, as the first of a document on a shifted grid does.
    """

    branch: int
    index: int
    start: int
    stop: int
    dilation_rate: int
    lead: int = 0

    @property
    def compact_rows(self) -> int:
        """Return the rows of the segment's compact buffer: the largest number that any head keeps, that of offset 0."""
        return kept_rows(self.stop - self.start, 0, self.dilation_rate)

    def exchange_bounds(self, halves: tuple[int, ...]) -> tuple[int, int]:
        """Return ``(key_stop, query_start)``, which bound what a causal model exchanges of this segment.

        Only keys before row ``key_stop`` are needed in other windows, and only by queries from ``query_start`` on.
        Where the branch computes only queries of the second half against keys of the first, both are the middle.

        Args:
            halves: rows of the first half for each branch, 0 where it has none (``overlap.first_halves``); may be
                empty.
        """
        half = halves[self.branch] if halves else 0
        if half and half <= self.lead:  # all rows are in the second half
            return self.start, self.stop
        middle = min(self.start + half - self.lead, self.stop)
        return (middle, middle) if half else (self.stop, self.start)


@dataclass(frozen=True, slots=True)
class Piece:
    """A Piece is the work of one kernel call: query rows of consecutive segments of one branch, and their keys.

    All rows are global. A kernel finds them so:

    * query row ``x`` is row ``x - window_start`` of the query buffer;
    * if ``compact`` is false, key row ``x`` is row ``x - window_start`` of the key buffer;
    * if ``compact`` is true, there is one segment, and key ``i`` of a head is row ``i`` of its compact buffer.

    In segment ``s``, for head offset ``o``, query ``j`` and key ``j`` are both global row ``s·w + o + j·r``. A causal
    query ``j`` sees the keys ``i <= j``, whatever the branch, segment and head.

    Attributes:
        branch: index of the branch in the pattern.
        segment_length: ``w`` of the branch.
        dilation_rate: ``r`` of the branch.
        first_segment: index of the first segment.
        num_segments: number of segments.
        window_start: first row of the window.
        query_start: first row whose query is computed.
        query_stop: end (exclusive) of these rows.
        key_stop: end (exclusive) of the rows whose keys are given, at most the end of the last segment.
        compact: whether the keys are in the compact buffer of a segment.
        half: 0: each query sees the keys of its segment. ``h > 0``: only queries behind the first ``h`` rows of a
            segment are computed, against all keys in these rows. ``-h``: only queries in the first ``h`` rows, against
            all keys behind them. Where a segment lacks rows at its start, they count. Only kernels that merge overlaps
            get such pieces.
        overlap_rates: the branches whose pairs this piece computes too, see :class:`~.overlap.Overlap`.
        table: the segments where they are not all of ``w`` rows: those of packed documents and of shifted grids.
            ``first_segment`` is 0 then, and segments are numbered by their place in the table.
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
    table: SegmentTable | None = None

    def bounds(self, segment: int) -> tuple[int, int]:
        """Return the global rows ``[start, stop)`` of a segment; in a compact piece or table up to the window's end."""
        if self.table is not None:
            return int(self.table.starts[segment]), int(self.table.stops[segment])
        return segment * self.segment_length, (segment + 1) * self.segment_length

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield ``(first_segment, num_segments)`` of runs of equally long segments: the full ones, then a short one."""
        if self.table is not None:
            yield from ((segment, 1) for segment in range(self.num_segments))
            return
        full = (self.key_stop - self.first_segment * self.segment_length) // self.segment_length
        full = min(full, self.num_segments) if not self.compact else 0
        if full:
            yield self.first_segment, full
        if full < self.num_segments:
            yield self.first_segment + full, self.num_segments - full

    def queries(self, segment: int, offset: int) -> tuple[int, int, int]:
        """Return ``(first_row, count, first_index)`` of the queries of a head in ``segment``.

        Args:
            segment: index of the segment in the branch.
            offset: offset ``o`` of the head.

        Returns:
            the first query's row in the query buffer (further ones are ``r`` apart), the number of queries, and the
            index ``j`` of the first one.
        """
        # kept_rows(x, 0, r) = ceil(x / r): the smallest j with o + j·r >= x.
        begin, end = self.bounds(segment)
        start = begin + offset
        first = kept_rows(max(self.query_start - start, 0), 0, self.dilation_rate)
        stop = kept_rows(min(self.query_stop, end) - start, 0, self.dilation_rate)
        return start + first * self.dilation_rate - self.window_start, max(0, stop - first), first

    def keys(self, segment: int, offset: int) -> tuple[int, int, int]:
        """Return ``(first_row, count, step)`` of the keys of a head in ``segment``.

        Args:
            segment: index of the segment in the branch.
            offset: offset ``o`` of the head.

        Returns:
            the first key's row in the key buffer, the number of keys, and the buffer rows from one key to the next.
        """
        start, end = self.bounds(segment)
        count = kept_rows(min(self.key_stop, end) - start, offset, self.dilation_rate)
        return (0, count, 1) if self.compact else (start + offset - self.window_start, count, self.dilation_rate)


@bounded_cache(maxsize=512)
def dense_pieces(
    pattern: DilatedPattern,
    start: int,
    stop: int,
    total_rows: int,
    causal: bool,
    documents: Documents | None = None,
) -> tuple[Piece, ...]:
    """Return the pieces of window ``[start, stop)`` whose keys are all in the window, at most one for each branch.

    They are the segments inside the window. In a causal model a segment that starts inside and ends behind the window
    counts too, since its queries in the window do not see the rows behind it.

    Args:
        pattern: the branches.
        start: first row of the window.
        stop: end (exclusive) of the window.
        total_rows: rows of the sequence.
        causal: whether a row sees only itself and earlier rows.
        documents: the documents of the sequence; None: it is one.
    """
    documents = listed_documents(pattern, total_rows, documents)
    if documents is not None:
        found = (
            _document_piece(number, branch, start, stop, causal, documents) for number, branch in enumerate(pattern)
        )
        return tuple(piece for piece in found if piece is not None)
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


def listed_documents(pattern: DilatedPattern, total_rows: int, documents: Documents | None) -> Documents | None:
    """Return the documents where segments must be listed: a shifted grid makes one document of the sequence."""
    return Documents.whole(total_rows) if documents is None and pattern.shifted else documents


def _document_piece(
    number: int, branch: Branch, start: int, stop: int, causal: bool, documents: Documents
) -> Piece | None:
    """Return the piece of one branch of a window of packed documents; None without a segment."""
    part = _cut(segment_table(documents, branch.segment_length, branch.shift), start, stop, causal)
    if not len(part):
        return None
    rows = int(part.starts[0]), min(int(part.stops[-1]), stop)
    width, rate = branch.segment_length, branch.dilation_rate
    return Piece(number, width, rate, 0, len(part), start, *rows, rows[1], compact=False, table=part)


@bounded_cache(maxsize=512)
def _cut(table: SegmentTable, start: int, stop: int, causal: bool) -> SegmentTable:
    """Return the segments that begin in window ``[start, stop)`` and, unless the model is causal, end there."""
    first = int(np.searchsorted(table.starts, start))
    last = int(np.searchsorted(table.starts, stop) if causal else np.searchsorted(table.stops, stop, side="right"))
    part = slice(first, max(first, last))
    return SegmentTable(table.starts[part], table.stops[part], table.leads[part])


def segment_at(
    pattern: DilatedPattern, number: int, row: int, total_rows: int, documents: Documents | None
) -> Segment | None:
    """Return the segment of branch ``number`` that contains a row; None in padding.

    Segments of packed documents are numbered by their first row.
    """
    branch = pattern.branches[number]
    width, rate = branch.segment_length, branch.dilation_rate
    documents = listed_documents(pattern, total_rows, documents)
    if documents is None:
        index = row // width
        return Segment(number, index, index * width, min((index + 1) * width, total_rows), rate)
    document = documents.containing(row)
    if document is None:
        return None
    begin, end = branch.segment_of(row - document[0])
    first = document[0] + begin
    return Segment(number, first, first, min(document[0] + end, document[1]), rate, width - (end - begin))


@bounded_cache(maxsize=512)
def edge_segments(
    pattern: DilatedPattern, start: int, stop: int, total_rows: int, documents: Documents | None = None
) -> tuple[Segment, ...]:
    """Return the segments that cross an edge of window ``[start, stop)``, ordered by branch, then index.

    There are at most two for each branch: one at the first row and one at the last.
    """
    crossing = []
    for number in range(len(pattern)):
        found = [segment_at(pattern, number, row, total_rows, documents) for row in (start, stop - 1)]
        if found[0] == found[1]:
            del found[1]
        crossing += [segment for segment in found if segment and (segment.start < start or segment.stop > stop)]
    return tuple(crossing)


def open_segments(
    pattern: DilatedPattern, row: int, total_rows: int, documents: Documents | None = None
) -> tuple[Segment, ...]:
    """Return the segments that contain both row ``row - 1`` and ``row``, at most one for each branch."""
    if not 0 < row < total_rows:
        return ()
    found = (segment_at(pattern, number, row - 1, total_rows, documents) for number in range(len(pattern)))
    return tuple(segment for segment in found if segment and segment.stop > row)


@bounded_cache(maxsize=512)
def shared_segments(
    pattern: DilatedPattern,
    start: int,
    stop: int,
    total_rows: int,
    causal: bool,
    halves: tuple[int, ...] = (),
    documents: Documents | None = None,
) -> tuple[Segment, ...]:
    """Return the segments for which window ``[start, stop)`` needs keys of other windows, by branch, then index.

    In a causal model they are the segments that began before the window. Each is cut at the end of the window, since
    later keys are not seen, or earlier, at the last key that any query needs (:meth:`Segment.exchange_bounds`).

    Args:
        pattern: the branches.
        start: first row of the window.
        stop: end (exclusive) of the window.
        total_rows: rows of the sequence.
        causal: whether a row sees only itself and earlier rows.
        halves: see :meth:`Segment.exchange_bounds`; for causal models only.
        documents: the documents of the sequence; None: it is one.
    """
    segments = edge_segments(pattern, start, stop, total_rows, documents)
    if not causal:
        return segments
    began = ((s, *s.exchange_bounds(halves)) for s in segments if s.start < start)
    return tuple(replace(s, stop=min(last, stop)) for s, last, first in began if first < min(s.stop, stop))


def compact_piece(
    pattern: DilatedPattern, segment: Segment, start: int, stop: int, documents: Documents | None = None
) -> Piece:
    """Return the piece for the queries of a shared segment in window ``[start, stop)``; its keys are compact.

    The segment may end where later keys are not needed; its queries may lie behind.
    """
    width = pattern.branches[segment.branch].segment_length
    end, index, table = segment.start + width - segment.lead, segment.index, None
    if documents is not None:
        document = documents.containing(segment.start)
        assert document is not None
        end = min(end, document[1])
    if documents is not None or pattern.shifted:
        index, table = 0, _one_segment(segment.start, end, segment.lead)
    rows = max(start, segment.start), min(stop, end), segment.stop
    return Piece(segment.branch, width, segment.dilation_rate, index, 1, start, *rows, compact=True, table=table)


@bounded_cache(maxsize=512)
def _one_segment(start: int, stop: int, lead: int) -> SegmentTable:
    return SegmentTable(*(np.array([number], np.int64) for number in (start, stop, lead)))


def needs_exchange(pattern: DilatedPattern, shards: Shards, documents: Documents | None = None) -> bool:
    """Say whether any segment crosses the edge of a slice; the answer is the same on every rank.

    Hence all ranks or none take part in the exchange, which is a collective.
    """
    documents = listed_documents(pattern, shards.total_rows, documents)
    if documents is not None:
        return _documents_cross(pattern, shards, documents)
    edges = [shards.start, shards.stop]
    if shards.num_ranks > 1:
        edges.append(shards.start + shards.rows_per_rank)
    if shards.num_ranks > 2:
        # If w divides the first two inner edges, it divides their distance, and so all further ones.
        edges.append(shards.start + 2 * shards.rows_per_rank)
    return any(edge < shards.total_rows and edge % branch.segment_length for edge in edges for branch in pattern)


@bounded_cache(maxsize=256)
def _documents_cross(pattern: DilatedPattern, shards: Shards, documents: Documents) -> bool:
    edges = [shards.window(rank)[0] for rank in range(shards.num_ranks)] + [shards.stop]
    return any(
        segment is not None and segment.start < edge
        for edge in edges
        if edge < shards.total_rows
        for number in range(len(pattern))
        for segment in [segment_at(pattern, number, edge, shards.total_rows, documents)]
    )
