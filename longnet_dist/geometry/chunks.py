"""A streamed sequence is cut into chunks; this module counts the rows that are kept from one chunk to the next."""

from __future__ import annotations

from collections.abc import Sequence

from longnet_dist.errors import ConfigError
from longnet_dist.geometry.documents import Documents, as_integer
from longnet_dist.geometry.exchange_plan import buffered_segments
from longnet_dist.geometry.pattern import Branch, DilatedPattern
from longnet_dist.geometry.window import Segment, Shards


def chunks_of(
    total_rows: int, length: int, num_ranks: int = 1, start: int = 0, stop: int | None = None
) -> list[Shards]:
    """Cut rows ``[start, stop)`` into chunks of ``length`` rows, and each chunk into one slice for each rank.

    The last chunk may be shorter.

    Args:
        total_rows: rows ``N`` of the sequence.
        length: rows of a chunk, of all ranks together.
        num_ranks: ranks that share every chunk.
        start: first row, 0 if not given.
        stop: end (exclusive), ``N`` if not given.

    Raises:
        ConfigError: the length is less than 1.
        ShapeError: a chunk is too short to give every rank a row.
    """
    if (as_integer(length) or 0) < 1:
        raise ConfigError(f"the chunk length must be an integer of at least 1 row, not {length!r}")
    stop = total_rows if stop is None else stop
    return [
        Shards.even(total_rows, num_ranks, first, min(first + length, stop)) for first in range(start, stop, length)
    ]


def recorded_segments(
    pattern: DilatedPattern,
    chunks: Sequence[Shards],
    rank: int,
    causal: bool,
    documents: Documents | None = None,
) -> tuple[Segment, ...]:
    """Return the segments that ``rank`` buffers in any of the chunks, ordered by branch, then index.

    Each is given up to the last row that is buffered in any chunk.
    """
    held: dict[tuple[int, int], Segment] = {}
    for shards in chunks:
        for segment in buffered_segments(pattern, shards, rank, causal, documents=documents):
            key = segment.branch, segment.index
            if key not in held or held[key].stop < segment.stop:
                held[key] = segment
    return tuple(held[key] for key in sorted(held))


def cache_rows(pattern: DilatedPattern, total_rows: int, length: int, num_ranks: int = 1) -> int:
    """Return the rows for each key/value head that a layer caches at most during a causal stream.

    It is the sum of ``ceil(w/r)`` over the branches whose segments cross an edge of a chunk or slice. A branch counts
    twice if two of its segments can be open during a chunk. The result does not grow with ``N``.

    Args:
        pattern: the branches.
        total_rows: rows ``N`` of the sequence.
        length: rows of a chunk, of all ranks together.
        num_ranks: ranks that share every chunk.
    """
    return sum(
        _segments_at_once(branch, total_rows, length, num_ranks) * _rows(branch, total_rows) for branch in pattern
    )


def record_rows(pattern: DilatedPattern, total_rows: int, length: int, num_ranks: int = 1) -> int:
    """Return the rows for each key/value head that a layer keeps at most of a recorded stream, for its backward.

    It is about the sum of ``N/r`` over the branches whose segments cross an edge of a chunk or slice. Of branches with
    segments shorter than a chunk, only the segments that cross an edge count. The arguments are those of
    :func:`cache_rows`.
    """
    num_chunks = -(-total_rows // length)
    return sum(
        min(-(-(total_rows - branch.shift) // branch.segment_length) + (branch.shift > 0), at_once * num_chunks)
        * _rows(branch, total_rows)
        for branch in pattern
        if (at_once := _segments_at_once(branch, total_rows, length, num_ranks))
    )


def cache_bytes(rows: int, kv_heads: int, head_dim: int, layers: int, itemsize: int, batch: int = 1) -> int:
    """Return the bytes of a cache: a key and a value of ``head_dim`` numbers for each row, head, layer and sequence.

    Args:
        rows: cached rows for each key/value head, as from :func:`cache_rows`.
        kv_heads: key/value heads ``Hkv``.
        head_dim: ``D``.
        layers: number of layers.
        itemsize: bytes of a number.
        batch: number of sequences ``B``.
    """
    return rows * kv_heads * 2 * head_dim * layers * itemsize * batch


def _segments_at_once(branch: Branch, total_rows: int, length: int, num_ranks: int) -> int:
    """Return the largest number of segments of a branch of which a rank buffers rows during a chunk."""
    width, shift, length = branch.segment_length, branch.shift, min(length, total_rows)
    slices = {-(-rows // num_ranks) for rows in (length, total_rows % length) if num_ranks > 1} | {length}
    if (length == total_rows and num_ranks == 1) or all(rows % width == 0 for rows in (*slices, shift)):
        return 0
    if shift:  # a segment may end in a chunk and the next begin there, unless both do at its edge
        return 1 if width % length == shift % length == 0 else 2
    return 1 if length % width == 0 or width % length == 0 or width >= total_rows else 2


def _rows(branch: Branch, total_rows: int) -> int:
    return -(-min(branch.segment_length, total_rows) // branch.dilation_rate)
