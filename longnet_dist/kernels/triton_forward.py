# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Forward of one piece in one launch: all segments, heads and offsets, starting from the running ``(out, lse)``."""

from __future__ import annotations

import triton
import triton.language as tl

from longnet_dist.kernels.triton_tiles import UNSPECIALIZED, load_tile, locate, pointers, row_pointers

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=("r", "heads"))
def forward_kernel(
    q, k, v, running, out, lse, q_strides, k_strides, v_strides, out_strides, lse_strides,
    tiles, segments, heads, group, head_block, w, r,
    first_segment, window_start, query_start, query_stop, key_stop, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
    COMPACT: tl.constexpr, FRESH: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of ``QUERIES`` queries of a (batch, head, segment) against all keys it sees.

    The running softmax starts as (maximum = lse, sum = 1, accumulator = out), so the earlier branches need no merge;
    with ``FRESH`` nothing was written yet. ``running`` is ``out`` as a source of tiles. Scores
    and maxima are in units of log 2.
    """
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles  # causal: the longest first, so that no long one is left for the end
    segment = first_segment + (program // tiles) % segments
    batch_head = program // tiles // segments
    batch, head = batch_head // heads, batch_head % heads
    row, first, last, keys = locate(
        segment, head // group, head_block, w, r, window_start, query_start, query_stop, key_stop
    )
    first += tile * QUERIES
    if first >= last:
        return
    key_row, step = row, r
    if COMPACT:
        key_row, step = row * 0, 1

    index = first + tl.arange(0, QUERIES)
    valid = index < last
    columns = tl.arange(0, BLOCK_D)[None, :] < D
    lse_pointers = row_pointers(lse, lse_strides, batch, head, row, r, index)
    if FRESH:
        maximum = tl.full([QUERIES], -float("inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        result = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    else:
        maximum = tl.load(lse_pointers, mask=valid, other=0.0) * LOG2_E
        total = tl.full([QUERIES], 1.0, tl.float32)
        result = load_tile(running, out_strides, batch, head, row, r, first, last, QUERIES, D, BLOCK_D, DESCRIPTORS)
        result = result.to(tl.float32)

    query = load_tile(q, q_strides, batch, head, row, r, first, last, QUERIES, D, BLOCK_D, DESCRIPTORS)
    factor = scale * LOG2_E
    stop, full = keys, keys
    if CAUSAL:
        stop = tl.minimum(keys, first + QUERIES)
        full = tl.minimum(keys, first + 1)
    full = full // KEYS * KEYS
    for start in tl.range(0, full, KEYS):
        key = load_tile(k, k_strides, batch, head // group, key_row, step, start, keys, KEYS, D, BLOCK_D, DESCRIPTORS)
        scores = tl.dot(query, key.T, input_precision=PRECISION)
        new = tl.maximum(maximum, tl.max(scores, 1) * factor)
        weights = tl.math.exp2(scores * factor - new[:, None])
        shrink = tl.math.exp2(maximum - new)
        total = total * shrink + tl.sum(weights, 1)
        value = load_tile(v, v_strides, batch, head // group, key_row, step, start, keys, KEYS, D, BLOCK_D, DESCRIPTORS)
        result = tl.dot(weights.to(value.dtype), value, result * shrink[:, None], input_precision=PRECISION)
        maximum = new
    for start in tl.range(full, stop, KEYS):
        key = load_tile(k, k_strides, batch, head // group, key_row, step, start, keys, KEYS, D, BLOCK_D, DESCRIPTORS)
        scores = tl.dot(query, key.T, input_precision=PRECISION) * factor
        key_index = start + tl.arange(0, KEYS)
        seen = (key_index < keys)[None, :]
        if CAUSAL:
            seen = seen & (key_index[None, :] <= index[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        new = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new[:, None])
        shrink = tl.math.exp2(maximum - new)
        total = total * shrink + tl.sum(weights, 1)
        value = load_tile(v, v_strides, batch, head // group, key_row, step, start, keys, KEYS, D, BLOCK_D, DESCRIPTORS)
        result = tl.dot(weights.to(value.dtype), value, result * shrink[:, None], input_precision=PRECISION)
        maximum = new

    out_pointers = pointers(out, out_strides, batch, head, row, r, index, BLOCK_D)
    tl.store(out_pointers, (result / total[:, None]).to(out.dtype.element_ty), mask=valid[:, None] & columns)
    tl.store(lse_pointers, (maximum + tl.math.log2(total)) / LOG2_E, mask=valid)
