# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Where the rows of a (segment, head) stand, and tiles of them: device functions of the Triton kernels.

Query and key ``j`` of a (segment, head) are ``r`` rows apart, so a tile is a strided block of the sequence. It is read
where it stands: through a tensor descriptor (the copy engine of Hopper; view ``(B, n / r, r, H, D)``, in which row
``r·i + c`` is ``[i, c]``) where the buffer allows one, else through pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Integers that differ from call to call and gain nothing from a kernel compiled for their value.
UNSPECIALIZED = (
    "tiles", "segments", "w", "first_segment", "window_start", "query_start", "query_stop", "key_stop", "half",
    "overlaps", "heads_before",
)  # fmt: skip


@triton.jit
def numbered(kv_head, heads_before):
    """Return the number of a key/value head by which the offset rule knows it."""
    if heads_before is not None:
        kv_head += heads_before
    return kv_head


@triton.jit
def locate(segment, number, head_block, w, r, window_start, query_start, query_stop, key_stop, half, table=None):
    """``(row, first, stop, first_key, keys)``: buffer row of index 0 (may be negative), indices of the queries, keys.

    The integers of ``Piece.queries`` and ``Piece.keys``; with ``half`` the queries from there on and the keys before,
    with ``-half`` the other way round. ``number`` is :func:`numbered`, ``head_block`` is ``Problem.head_rule``.
    """
    offset = _offset(number, head_block, r)
    if table is not None:  # of every segment: the first row, the end, and the rows that it lacks at its start
        start = tl.load(table + 3 * segment) + offset
        stop = tl.load(table + 3 * segment + 1)
    else:
        start = segment.to(tl.int64) * w + offset
        stop = start + (w - offset)
    first = _count(query_start - start, w, r)
    last = _count(tl.minimum(query_stop, stop) - start, w, r)
    keys = _count(tl.minimum(key_stop, stop) - start, w, r)
    if table is not None:
        middle = _count(tl.abs(half) - tl.load(table + 3 * segment + 2) - offset, w, r)
    else:
        middle = _count(start * 0 + tl.abs(half) - offset, w, r)
    first_key = tl.where(half < 0, tl.minimum(keys, middle), 0)
    first = tl.where(half > 0, tl.maximum(first, middle), first)
    last = tl.where(half < 0, tl.minimum(last, middle), last)
    keys = tl.where(half > 0, tl.minimum(keys, middle), keys) - first_key
    return start - window_start, first, last, first_key, keys


@triton.jit
def _offset(number, rule, r):
    """The offset of a head: ``(number // rule) % r`` of an integer, or its entry of a table."""
    if isinstance(rule, tl.tensor) or isinstance(rule, int):  # noqa: SIM101 (device code)
        offset = (number // rule) % r
    else:
        offset = number * 0
        for head in tl.static_range(len(rule)):  # a table of arguments has no address to load from
            offset = tl.where(number == head, rule[head], offset)
    return offset


@triton.jit
def _count(length, w, r):
    """How many of the rows ``0 … length-1`` of a segment a head keeps, as int32."""
    return (tl.minimum(tl.maximum(length, 0), w).to(tl.int32) + r - 1) // r


@triton.jit
def pointers(base, strides, batch, head, row, step, index, BLOCK_D: tl.constexpr):
    """Pointers ``(len(index), BLOCK_D)`` to the rows ``row + step·index`` of a head of a ``(B, rows, H, D)`` buffer."""
    rows = (row + step * index.to(tl.int64)) * strides[1]
    start = base + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[2]
    return start + rows[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def row_pointers(base, strides, batch, head, row, step, index):
    """Pointers ``(len(index),)`` to the same rows of a ``(B, rows, H)`` buffer."""
    start = base + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[2]
    return start + (row + step * index.to(tl.int64)) * strides[1]


@triton.jit
def rows_of(row, step, first):
    """``(row, step, tile, column)`` of rows ``row + step·i``, ``i >= first``: row ``i`` is ``[tile + i, column]`` in a
    view ``(rows / step, step)``. Divides once, where a loop would for every tile."""
    origin = row + step * first
    return row, step, (origin // step).to(tl.int32) - first, (origin % step).to(tl.int32)


@triton.jit
def multiplicity_columns(index, column, head, r, factor, overlaps, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr):
    """Return sixteen more columns for queries or keys, whose inner product is the logarithm of a pair's multiplicity.

    A pair that ``n`` later branches hold too counts ``m = n + 1`` times. Their rows lie in one another, so it is the
    first ``n`` that hold it, and ``log2 m = Σ_{t=1…n} log2((t + 1) / t)``. One side (``WEIGHTED``) has a column with
    the number of a summand, the other has 1 there; both have 0 where the branch does not keep the row. Two columns
    share a summand: the number over ``factor``, rounded, and what its rounding leaves.

    ``column`` is ``0 … 15``, ``overlaps`` is ``Problem.overlaps``, ``head`` is :func:`numbered`. Rows
    ``overlap.PERIOD`` apart have equal columns.
    """
    number = column // 2
    # A later branch of rate 2^(step-1)·r keeps the rows ≡ h modulo its rate. Row j here is at h mod r + j·r, so it is
    # one of these if j ≡ h // r modulo 2^(step-1), for the number h of a head. Step 0 is no branch.
    step = (overlaps >> (4 * number)) & 15
    inside = ((index - head // r)[:, None] & (((1 << step) >> 1) - 1)[None, :]) == 0
    inside = inside & (step > 0)[None, :]
    columns = inside.to(tl.float32)
    if WEIGHTED:
        summand = tl.math.log2((number + 2).to(tl.float32) / (number + 1).to(tl.float32)) / factor
        rounded = summand.to(DTYPE).to(tl.float32)
        columns *= tl.where(column % 2 == 0, rounded, summand - rounded)[None, :]
    return columns.to(DTYPE)


@triton.jit
def load_tile(
    source, strides, batch, head, rows, first, stop,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Load rows ``first … first+ROWS-1`` of ``rows_of`` as a ``(ROWS, BLOCK_D)`` tile; columns from ``D`` on are 0.

    Rows from ``stop`` on hold 0 or, through a descriptor, rows of the next segment.
    """
    if DESCRIPTORS:
        tile = source.load([batch, rows[2] + first, rows[3], head, 0]).reshape(ROWS, BLOCK_D)
    else:
        index = first + tl.arange(0, ROWS)
        mask = (index < stop)[:, None]
        if D < BLOCK_D:
            mask = mask & (tl.arange(0, BLOCK_D) < D)[None, :]
        tile = tl.load(pointers(source, strides, batch, head, rows[0], rows[1], index, BLOCK_D), mask=mask, other=0.0)
    return tile
