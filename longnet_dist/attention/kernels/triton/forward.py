# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Forward of one piece in one launch: all segments, heads and offsets, starting from the running ``(out, lse)``."""

from __future__ import annotations

import triton
import triton.language as tl

from longnet_dist.attention.kernels.triton.tiles import (
    UNSPECIALIZED,
    load_tile,
    locate,
    multiplicity_columns,
    numbered,
    pointers,
    row_pointers,
    rows_of,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scores_of(left, left_columns, right, right_columns, OVERLAPS: tl.constexpr, PRECISION: tl.constexpr):
    """Return ``left · rightᵀ``, to which the columns of ``multiplicity_columns``, if any, add ``ln m / scale``.

    ``right_columns (16, n)`` come transposed: what a loop transposes, Triton 3.9 writes to shared memory in every step.
    """
    if OVERLAPS:
        scores = tl.dot(left_columns, right_columns, input_precision=PRECISION)
        scores = tl.dot(left, right.T, scores, input_precision=PRECISION)
    else:
        scores = tl.dot(left, right.T, input_precision=PRECISION)
    return scores


@triton.jit
def _attend(
    query, query_columns, key_columns, maximum, total, result, k, v, k_strides, v_strides, batch, kv_head, rows,
    begin, end, index, begin_key, keys, factor, r, number, overlaps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, OVERLAPS: tl.constexpr,
    MASKED: tl.constexpr, FIXED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the running softmax after keys ``begin … end-1``; with ``FIXED`` it keeps its ``maximum``.

    With scores ``s`` in units of log 2 and a level ``m`` for each query it holds ``total = Σ 2^(s - m)`` and
    ``result = Σ 2^(s - m) v``, so that ``O = result / total`` and ``LSE = ln 2 · (m + log2 total)`` for any ``m``.
    """
    for start in tl.range(begin, end, KEYS):
        key = load_tile(k, k_strides, batch, kv_head, rows, start, keys, KEYS, D, BLOCK_D, DESCRIPTORS)
        if OVERLAPS and KEYS % 64 != 0:
            place = begin_key + start + tl.arange(0, KEYS)
            key_columns = multiplicity_columns(
                place, tl.arange(0, 16), number, r, factor, overlaps, False, query.dtype
            ).T
        # scale·q·k + ln m, over ln 2: the GPU has exp2 alone.
        scores = scores_of(query, query_columns, key, key_columns, OVERLAPS, PRECISION) * factor
        if MASKED:
            key_index = start + tl.arange(0, KEYS)
            seen = (key_index < keys)[None, :]
            if CAUSAL:
                seen = seen & (key_index[None, :] <= index[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        level = maximum
        if not FIXED:
            # From level m to m' = max(m, max s) both sums shrink by 2^(m - m'). Without any key m' is -inf, where a
            # level of 0 gives 2^(-inf) = 0 and no NaN.
            new = tl.maximum(maximum, tl.max(scores, 1))
            level = tl.where(new == -float("inf"), 0.0, new)
            shrink = tl.math.exp2(maximum - level)
            total *= shrink
            result *= shrink[:, None]
            maximum = new
        # total += Σ 2^(s - m'), result += Σ 2^(s - m') v.
        weights = tl.math.exp2(scores - level[:, None])
        total += tl.sum(weights, 1)
        value = load_tile(v, v_strides, batch, kv_head, rows, start, keys, KEYS, D, BLOCK_D, DESCRIPTORS)
        result = tl.dot(weights.to(value.dtype), value, result, input_precision=PRECISION)
    return maximum, total, result


@triton.jit
def _start(
    running, lse_pointers, valid, out_strides, batch, head, rows, first, last,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, FRESH: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Return the running softmax of the earlier branches: (maximum = lse, sum = 1, accumulator = out).

    ``out = Σ exp(s - lse) v`` and ``Σ exp(s - lse) = 1``: so it is the running softmax at level ``lse``, and going on
    from it merges the branches as equations 9 and 10 do.
    """
    if FRESH:
        maximum = tl.full([QUERIES], -float("inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        result = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    else:
        maximum = tl.load(lse_pointers, mask=valid, other=0.0) * LOG2_E
        total = tl.full([QUERIES], 1.0, tl.float32)
        result = load_tile(running, out_strides, batch, head, rows, first, last, QUERIES, D, BLOCK_D, DESCRIPTORS)
        result = result.to(tl.float32)
    return maximum, total, result


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=("r", "heads"))
def forward_kernel(
    q, k, v, running, out, lse, q_strides, k_strides, v_strides, out_strides, lse_strides,
    tiles, segments, heads, group, head_block, w, r,
    first_segment, window_start, query_start, query_stop, key_stop, half, overlaps, scale, table, heads_before,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
    OVERLAPS: tl.constexpr, COMPACT: tl.constexpr, FRESH: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """One tile of ``QUERIES`` queries of a (batch, head, segment) against all keys it sees.

    The running softmax starts as (maximum = lse, sum = 1, accumulator = out), so the earlier branches need no merge;
    with ``FRESH`` nothing was written yet. ``running`` is ``out`` as a source of tiles. Units of scores: log 2.
    """
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles  # causal: the longest first, so that no long one is left for the end
    segment = first_segment + (program // tiles) % segments
    batch_head = program // tiles // segments
    batch, head, number = batch_head // heads, batch_head % heads, numbered(batch_head % heads // group, heads_before)
    row, first, last, begin_key, keys = locate(
        segment, number, head_block, w, r, window_start, query_start, query_stop, key_stop, half, table
    )
    first += tile * QUERIES
    if first >= last:
        return
    rows = rows_of(row, r, first)
    key_rows = rows_of(row * 0 + begin_key, 1, 0) if COMPACT else rows_of(row + r * begin_key, r, 0)
    index = first + tl.arange(0, QUERIES)
    valid = index < last
    columns = tl.arange(0, BLOCK_D)[None, :] < D
    lse_pointers = row_pointers(lse, lse_strides, batch, head, row, r, index)
    query = load_tile(q, q_strides, batch, head, rows, first, last, QUERIES, D, BLOCK_D, DESCRIPTORS)
    factor, kv_head = scale * LOG2_E, head // group
    query_columns, key_columns = 0, 0
    if OVERLAPS:
        query_columns = multiplicity_columns(index, tl.arange(0, 16), number, r, factor, overlaps, True, query.dtype)
        key_columns = multiplicity_columns(
            begin_key + tl.arange(0, KEYS), tl.arange(0, 16), number, r, factor, overlaps, False, query.dtype
        ).T
    # Keys from ``full`` on, which come first: masked for some query, or the last ones where no maximum is known yet.
    stop, full = keys, keys // KEYS * KEYS
    if CAUSAL:
        stop = tl.minimum(keys, first + QUERIES)
        full = tl.minimum(keys, first) // KEYS * KEYS
    if FRESH:
        full = tl.minimum(full, tl.maximum(stop - 1, 0) // KEYS * KEYS)
    maximum, total, result = _start(
        running, lse_pointers, valid, out_strides, batch, head, rows, first, last,
        D, BLOCK_D, QUERIES, FRESH, DESCRIPTORS,
    )  # fmt: skip
    maximum, total, result = _attend(
        query, query_columns, key_columns, maximum, total, result, k, v, k_strides, v_strides, batch, kv_head,
        key_rows, full, stop, index, begin_key, keys, factor, r, number, overlaps,
        D, BLOCK_D, KEYS, CAUSAL, OVERLAPS, True, False, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    # The maximum only guards against overflow. What the first keys, or the earlier branches, left does so for nearly
    # all others, and then nothing waits for it and nothing is scaled again.
    bare = maximum == -float("inf")  # no key so far, so none of the weight that the running result else stands for
    total = tl.where(bare, 0.0, total)
    maximum = tl.where(bare, 0.0, maximum)
    maximum, total, result = _attend(
        query, query_columns, key_columns, maximum, total, result, k, v, k_strides, v_strides, batch, kv_head,
        key_rows, 0, full, index, begin_key, keys, factor, r, number, overlaps,
        D, BLOCK_D, KEYS, CAUSAL, OVERLAPS, False, True, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    safe = ((total > 1 / LIMIT) & (total < LIMIT)) | (index >= last)
    if tl.min(safe.to(tl.int32), 0) == 0:
        maximum, total, result = _start(
            running, lse_pointers, valid, out_strides, batch, head, rows, first, last,
            D, BLOCK_D, QUERIES, FRESH, DESCRIPTORS,
        )  # fmt: skip
        maximum, total, result = _attend(
            query, query_columns, key_columns, maximum, total, result, k, v, k_strides, v_strides, batch, kv_head,
            key_rows, 0, stop, index, begin_key, keys, factor, r, number, overlaps,
            D, BLOCK_D, KEYS, CAUSAL, OVERLAPS, True, False, DESCRIPTORS, PRECISION,
        )  # fmt: skip

    # O = result / total, LSE = ln 2 · (m + log2 total).
    out_pointers = pointers(out, out_strides, batch, head, row, r, index, BLOCK_D)
    tl.store(out_pointers, (result / total[:, None]).to(out.dtype.element_ty), mask=valid[:, None] & columns)
    tl.store(lse_pointers, (maximum + tl.math.log2(total)) / LOG2_E, mask=valid)
