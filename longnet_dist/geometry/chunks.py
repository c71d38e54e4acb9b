"""The chunks of a streamed sequence, and how many rows they leave for each other, in integers only."""

from __future__ import annotations

from collections.abc import Sequence

from longnet_dist.errors import ConfigError
from longnet_dist.geometry.exchange_plan import buffered_segments
from longnet_dist.geometry.pattern import Branch, DilatedPattern
from longnet_dist.geometry.window import Segment, Shards


def chunks_of(
    total_rows: int, length: int, num_ranks: int = 1, start: int = 0, stop: int | None = None
) -> list[Shards]:
    """Rows ``[start, stop)`` in chunks of ``length``, each cut into slices of ranks; the last holds what is left.

    Args:
        total_rows: ``N``.
        length: rows of a chunk.
        num_ranks: ranks that share every chunk.
        start: first row, 0 if not given.
        stop: end (exclusive), ``N`` if not given.

    Raises:
        ConfigError: a length under 1.
        ShapeError: a chunk too short to give every rank a row.
    """
    if length < 1:
        raise ConfigError(f"the chunk length must be at least 1 row, not {length}")
    stop = total_rows if stop is None else stop
    return [
        Shards.even(total_rows, num_ranks, first, min(first + length, stop)) for first in range(start, stop, length)
    ]


def recorded_segments(
    pattern: DilatedPattern, chunks: Sequence[Shards], rank: int, causal: bool
) -> tuple[Segment, ...]:
    """All segments that ``rank`` holds in any chunk, by branch and index, each up to the last row it can hold."""
    held: dict[tuple[int, int], Segment] = {}
    for shards in chunks:
        for segment in buffered_segments(pattern, shards, rank, causal):
            key = segment.branch, segment.index
            if key not in held or held[key].stop < segment.stop:
                held[key] = segment
    return tuple(held[key] for key in sorted(held))


def cache_rows(pattern: DilatedPattern, total_rows: int, length: int, num_ranks: int = 1) -> int:
    """Rows a key/value head that a layer caches at most while a causal stream passes.

    ``Σ ceil(w/r)`` over the branches whose segments cross an edge of a chunk or slice, twice for those of which a chunk
    can touch two at once; no more than the sequence has. It does not grow with N.
    """
    return sum(
        _segments_at_once(branch, total_rows, length, num_ranks) * _rows(branch, total_rows) for branch in pattern
    )


def record_rows(pattern: DilatedPattern, total_rows: int, length: int, num_ranks: int = 1) -> int:
    """Rows a key/value head that a layer keeps at most of a recorded stream, for its backward: about ``Σ N/r``.

    The sum is over the branches whose segments cross an edge; those shorter than a chunk count where they do.
    """
    num_chunks = -(-total_rows // length)
    return sum(
        min(-(-total_rows // branch.segment_length), at_once * num_chunks) * _rows(branch, total_rows)
        for branch in pattern
        if (at_once := _segments_at_once(branch, total_rows, length, num_ranks))
    )


def cache_bytes(rows: int, kv_heads: int, head_dim: int, layers: int, itemsize: int, batch: int = 1) -> int:
    """Bytes of ``rows`` cached rows a head: a key and a value of ``head_dim`` numbers, in every layer and sequence."""
    return rows * kv_heads * 2 * head_dim * layers * itemsize * batch


def _segments_at_once(branch: Branch, total_rows: int, length: int, num_ranks: int) -> int:
    """Segments of a branch of which a rank holds rows during a chunk, at most."""
    width, length = branch.segment_length, min(length, total_rows)
    slices = {-(-rows // num_ranks) for rows in (length, total_rows % length) if num_ranks > 1} | {length}
    if (length == total_rows and num_ranks == 1) or all(rows % width == 0 for rows in slices):
        return 0
    return 1 if length % width == 0 or width % length == 0 or width >= total_rows else 2


def _rows(branch: Branch, total_rows: int) -> int:
    return -(-min(branch.segment_length, total_rows) // branch.dilation_rate)
