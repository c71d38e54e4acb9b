"""Packed documents and padding, in integers only.

A sequence of ``N`` rows may hold several documents, one behind the other. Segments, head offsets and the grid restart
at the first row of each document, so that a document computes what it computes alone. Rows outside all documents are
padding. The segments of a branch are then of unequal lengths, and a :class:`SegmentTable` lists them.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from longnet_dist.caches import bounded_cache
from longnet_dist.errors import ShapeError

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Documents:
    """The documents of one sequence: rows ``[start, stop)`` of each, ascending and apart; hashable.

    Attributes:
        starts: first rows.
        stops: ends (exclusive).
    """

    starts: tuple[int, ...]
    stops: tuple[int, ...]

    @classmethod
    def of_edges(cls, edges: Sequence[int] | Integers) -> Documents:
        """Return the documents between neighbouring ``edges``, which must have been checked.

        Equal edges give one object, so that the layers of a model share what is worked out for it.
        """
        return _between(np.asarray(edges, np.int64).tobytes())

    @classmethod
    def whole(cls, rows: int) -> Documents:
        """Return one document of ``rows`` rows."""
        return cls.of_edges((0, rows))

    def covers(self, start: int, stop: int) -> bool:
        """Return whether no row of ``[start, stop)`` is padding."""
        rows = np.clip(self.array_stops, start, stop) - np.clip(self.array_starts, start, stop)
        return int(rows.sum()) == stop - start

    def cut(self, length: int, period: int) -> Documents:
        """Return documents that end at every ``length``-th row of each ``period`` rows as well."""
        rows = np.arange(0, int(self.array_stops[-1]), period)[:, None] + np.arange(0, period, length)
        cuts = rows[rows < self.array_stops[-1]]
        document = np.searchsorted(self.array_starts, cuts, side="right") - 1
        inside = (document >= 0) & (self.array_starts[document] < cuts) & (cuts < self.array_stops[document])
        starts, stops = (np.sort(np.append(part, cuts[inside])) for part in (self.array_starts, self.array_stops))
        return Documents(tuple(starts.tolist()), tuple(stops.tolist()))

    def padding(self, start: int, stop: int) -> list[slice]:
        """Return the rows of window ``[start, stop)`` that lie outside all documents, counted from ``start``."""
        cuts = np.clip(np.stack([self.array_starts, self.array_stops], 1), start, stop)
        edges = [start, *cuts.flatten().tolist(), stop]
        return [slice(x - start, y - start) for x, y in zip(edges[::2], edges[1::2], strict=True) if x < y]

    def __hash__(self) -> int:
        # Every call looks its plan up by its documents, which may be thousands.
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.starts, self.stops))

    @cached_property
    def digest(self) -> int:
        """Return an integer of 7 bytes that is equal in all processes for equal documents."""
        edges = self.array_starts.tobytes() + self.array_stops.tobytes()
        return int.from_bytes(hashlib.sha256(edges).digest()[:7], "big")

    @cached_property
    def longest(self) -> int:
        """Return the rows of the longest document."""
        return int((self.array_stops - self.array_starts).max())

    @cached_property
    def array_starts(self) -> Integers:
        """Return the first rows as an array."""
        return np.array(self.starts, np.int64)

    @cached_property
    def array_stops(self) -> Integers:
        """Return the ends as an array."""
        return np.array(self.stops, np.int64)

    def containing(self, row: int) -> tuple[int, int] | None:
        """Return the document ``(start, stop)`` of a row; None if it is padding."""
        number = bisect_right(self.starts, row) - 1
        if number < 0 or row >= self.stops[number]:
            return None
        return self.starts[number], self.stops[number]


@bounded_cache(maxsize=64)
def _between(edges: bytes) -> Documents:
    array = np.frombuffer(edges, np.int64).copy()
    found = array.tolist()
    documents = Documents(tuple(found[:-1]), tuple(found[1:]))
    # The cached properties would make these again from the tuples, which takes longer.
    vars(documents).update(array_starts=array[:-1], array_stops=array[1:])
    return documents


@dataclass(frozen=True, eq=False)
class SegmentTable:
    """The segments of a branch, of any length.

    Attributes:
        starts: global row at which each segment, and the count of its rows, begins.
        stops: end (exclusive) of each.
        leads: rows that each lacks at its start: the first of a document does where the grid is shifted.
    """

    starts: Integers
    stops: Integers
    leads: Integers

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def longest(self) -> int:
        """Return the rows of the longest segment."""
        return int((self.stops - self.starts).max())


def segment_table(documents: Documents, segment_length: int, shift: int = 0) -> SegmentTable:
    """Return all segments of a branch of ``segment_length`` rows, document by document.

    Args:
        documents: of the sequence.
        segment_length: ``w``.
        shift: ``s``, the row of a document at which the grid begins; a first segment of ``s`` rows lies before it.
    """
    # Without a shift, all branches that are longer than every document have the same segments: the documents.
    return _table(documents, segment_length if shift else min(segment_length, documents.longest), shift)


@bounded_cache(maxsize=64)
def _table(documents: Documents, segment_length: int, shift: int) -> SegmentTable:
    lengths = documents.array_stops - documents.array_starts
    shorter = int(shift > 0)
    counts = shorter - np.minimum((shift - lengths) // segment_length, 0)  # s > 0, and ceil((length - s) / w)
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    # The first segment is a whole one that begins before its document and is cut there.
    begin = shift + (number - shorter) * segment_length
    first = documents.array_starts[document]
    stops = np.minimum(first + begin + segment_length, documents.array_stops[document])
    return SegmentTable(first + np.maximum(begin, 0), stops, np.maximum(-begin, 0))


def read_edges(cu_seqlens: Any, batch: int, total_rows: int | None) -> list[Integers]:
    """Read and check ``cu_seqlens``: the edges of all batch items, or a list of such lists, one an item.

    Args:
        cu_seqlens: host integers, strictly increasing: ``[0, a, …, N]``. A list may begin above 0 and end below ``N``;
            rows outside are padding. Lists, tuples, ranges, arrays and tensors of the CPU are taken.
        batch: number of batch items.
        total_rows: ``N``, rows of the sequence over all ranks; None: not known yet.

    Returns:
        One array for all items, or one for each.

    Raises:
        ShapeError: not integers on the host, not strictly increasing, outside the sequence, without a document, or
            lists of another number than the batch items.
    """
    _refuse_devices(cu_seqlens)
    values = cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else cu_seqlens
    if not isinstance(values, _LISTS):
        raise ShapeError(f"cu_seqlens must be a list of document edges, not {cu_seqlens!r}; {_REMEDY}")
    if len(values) and type(values[0]) is not int:  # lists, or integers of numpy or torch
        for value in values:
            _refuse_devices(value)
        values = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    nested = len(values) > 0 and all(isinstance(value, _LISTS) for value in values)
    lists = values if nested else [values]
    if nested and len(lists) != batch:
        raise ShapeError(
            f"cu_seqlens must be one list of edges, or one for each of the {batch} batch items, but there are "
            f"{len(lists)} lists"
        )
    return [_checked(edges, total_rows) for edges in lists]


_LISTS = (list, tuple, range)
_REMEDY = "give integers of the host, such as [0, 1000, 4096], or one such list for each batch item"
_MOST_ROWS = 2**62


def _refuse_devices(edges: Any) -> None:
    device = getattr(edges, "device", None)
    if getattr(device, "type", "cpu") != "cpu":
        raise ShapeError(
            f"cu_seqlens must be integers of the host (a list, an array or a CPU tensor), because they decide what is "
            f"launched, but they are on {device}; pass cu_seqlens.tolist()"
        )


def _checked(edges: Any, total_rows: int | None) -> Integers:
    found = _ascending(edges)
    if found is None:
        found = np.array(_refused_unless_right(edges, total_rows), np.int64)
    if total_rows is not None:
        check_end(int(found[-1]), total_rows)
    return found


def _ascending(edges: Any) -> Integers | None:
    """Return edges that are right at first sight: a batch may have thousands of documents, and each layer looks."""
    if len(edges) < 2 or set(map(type, edges)) != {int} or max(edges) >= _MOST_ROWS or edges[0] < 0:
        return None
    found = np.array(edges, np.int64)
    return found if (found[1:] > found[:-1]).all() else None


def _refused_unless_right(edges: Any, total_rows: int | None) -> list[int]:
    shown = f"{list(edges[:6])}{' …' if len(edges) > 6 else ''}"
    found = [number for number in map(as_integer, edges) if number is not None]
    if len(found) < len(edges):
        raise ShapeError(f"the edges of documents must be integers, but are {shown}; {_REMEDY}")
    if len(found) < 2:
        raise ShapeError(
            f"a sequence needs at least one document, that is two edges, but cu_seqlens is {shown}; give [0, N] for "
            f"one document of N rows"
        )
    wrong = next((place for place, (x, y) in enumerate(pairwise(found)) if x >= y), None)
    if wrong is not None:
        raise ShapeError(
            f"the edges of documents must be strictly increasing, but {found[wrong]} is followed by "
            f"{found[wrong + 1]}; leave out documents without rows"
        )
    if found[0] < 0:
        raise ShapeError(
            f"the edges of documents count rows from 0, but begin with {found[0]}; begin with the first row that is "
            f"no padding"
        )
    check_end(found[-1], _MOST_ROWS if total_rows is None else total_rows)
    return found


def as_integer(value: Any) -> int | None:
    """Return an integer of Python, numpy or torch as one of Python; None for anything else, also for booleans."""
    if isinstance(value, bool):
        return None
    try:
        return index(value)
    except (TypeError, ValueError):
        return None


def check_end(last: int, total_rows: int) -> None:
    """Raise ShapeError if the ``last`` edge of documents lies behind the sequence."""
    if last > total_rows:
        raise ShapeError(
            f"the edges of documents must lie in the sequence, which has {total_rows} rows over all ranks, but the "
            f"last is {last}; a document that is cut there ends there"
        )
