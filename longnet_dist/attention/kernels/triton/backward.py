# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Backward of one piece: dK and dV with dQ added on the way, or dQ in a launch of its own.

Symbols: ``weights`` = P = m exp(scale·q·k − lse) with the multiplicity m of a pair and the *merged* lse, ``gradient`` =
dP = dO Vᵀ and then dS = P ∘ (dP − delta). As ``log m`` is constant, m enters by way of P alone. The kernels take lse in
units of log 2. The algebra is that of :mod:`longnet_dist.attention.kernels.contract`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longnet_dist.attention.kernels.triton.forward import LOG2_E, scores_of
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


@triton.jit
def statistics_kernel(
    dout, out, lse, statistics, dq, dout_strides, out_strides, lse_strides, statistics_strides, dq_strides, rows, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Write ``(lse / log 2, delta)`` of ``ROWS`` rows of a (batch, head), ``delta = rowsum(dO ∘ O)``; and ``dq = 0``.

    With ``DELTA`` this is what ``out (B, n, H)`` holds.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, ROWS)
    head, batch, tile = program % heads, program // heads // tiles, program // heads % tiles
    index = tile * ROWS + tl.arange(0, ROWS)
    zero = tile.to(tl.int64) * 0
    valid = index < rows
    mask = valid[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    if DELTA:
        delta = tl.load(row_pointers(out, out_strides, batch, head, zero, 1, index), mask=valid, other=0.0)
    else:
        a = tl.load(pointers(dout, dout_strides, batch, head, zero, 1, index, BLOCK_D), mask=mask, other=0.0)
        b = tl.load(pointers(out, out_strides, batch, head, zero, 1, index, BLOCK_D), mask=mask, other=0.0)
        delta = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)  # rowsum(dO ∘ O) = Σ_j P_ij dP_ij over all branches
    row_lse = tl.load(row_pointers(lse, lse_strides, batch, head, zero, 1, index), mask=valid, other=0.0)
    place = row_pointers(statistics, statistics_strides, batch, head, zero, 1, index)
    tl.store(place, row_lse * LOG2_E, mask=valid)
    tl.store(place + 1, delta, mask=valid)
    nothing = tl.zeros([ROWS, BLOCK_D], dq.dtype.element_ty)
    tl.store(pointers(dq, dq_strides, batch, head, zero, 1, index, BLOCK_D), nothing, mask=mask)


@triton.jit
def _weights(scores, lse, factor, key_index, index, keys, MASKED: tl.constexpr, CAUSAL: tl.constexpr):
    """Return P, the share in the whole softmax, in the shape to which ``key_index`` and ``index`` broadcast."""
    # exp(scale·q·k + ln m - lse) = 2^(s·factor - lse / ln 2).
    weights = tl.math.exp2(scores * factor - lse)
    if MASKED:
        seen = key_index < keys
        if CAUSAL:
            seen = seen & (key_index <= index)
        weights = tl.where(seen, weights, 0.0)
    return weights


@triton.jit
def _add_queries(
    key, key_columns, query_columns, value, dkey, dvalue, dout, q, statistics, dq, dout_strides, q_strides,
    statistics_strides, dq_strides, batch, head, rows, start, last, key_index, keys, factor, scale, number, r,
    overlaps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, OVERLAPS: tl.constexpr,
    MASKED: tl.constexpr, ADD_DQ: tl.constexpr, DESCRIPTORS: tl.constexpr, REDUCE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the part of ``QUERIES`` queries from ``start`` on to the gradients of a key tile, computed transposed.

    A row is a key: ``scores`` holds Sᵀ = K Qᵀ, ``weights`` holds Pᵀ, ``gradient`` dPᵀ and then dSᵀ.
    """
    index = start + tl.arange(0, QUERIES)
    valid = index < last
    query = load_tile(q, q_strides, batch, head, rows, start, last, QUERIES, D, BLOCK_D, DESCRIPTORS)
    # Queries behind the last have weight exp(-inf) = 0.
    place = row_pointers(statistics, statistics_strides, batch, head, rows[0], rows[1], index)
    row_lse = tl.load(place, mask=valid, other=float("inf"))
    if OVERLAPS and QUERIES % 64 != 0:
        query_columns = multiplicity_columns(index, tl.arange(0, 16), number, r, factor, overlaps, False, key.dtype).T
    scores = scores_of(key, key_columns, query, query_columns, OVERLAPS, PRECISION)
    weights = _weights(scores, row_lse[None, :], factor, key_index[:, None], index[None, :], keys, MASKED, CAUSAL)
    doutput = load_tile(dout, dout_strides, batch, head, rows, start, last, QUERIES, D, BLOCK_D, DESCRIPTORS)
    # dV += Pᵀ dO.
    dvalue = tl.dot(weights.to(doutput.dtype), doutput, dvalue, input_precision=PRECISION)
    row_delta = tl.load(place + 1, mask=valid, other=0.0)
    # dPᵀ = V dOᵀ, dSᵀ = Pᵀ ∘ (dPᵀ - delta), dK += dSᵀ Q; the factor scale of dK comes once, behind the loop.
    gradient = tl.dot(value, doutput.T, input_precision=PRECISION)
    gradient = (weights * (gradient - row_delta[None, :])).to(query.dtype)
    dkey = tl.dot(gradient, query, dkey, input_precision=PRECISION)
    if ADD_DQ:
        # dQ += scale·dS K: programs of other keys add to the same queries.
        dquery = tl.dot(gradient.T, key, input_precision=PRECISION) * scale
        if REDUCE:
            dq.atomic_add([batch, rows[2] + start, rows[3], head, 0], dquery.reshape(1, QUERIES, 1, 1, BLOCK_D))
        else:
            mask = valid[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
            dq_pointers = pointers(dq, dq_strides, batch, head, rows[0], rows[1], index, BLOCK_D)
            tl.atomic_add(dq_pointers, dquery, mask=mask, sem="relaxed")
    return dkey, dvalue


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=("r", "heads", "kv_heads"))
def key_gradient_kernel(
    dout, q, k, v, statistics, dq, dk, dv,
    dout_strides, q_strides, k_strides, v_strides, statistics_strides, dq_strides, dk_strides, dv_strides,
    tiles, segments, kv_heads, group, head_block, w, r,
    first_segment, window_start, query_start, query_stop, key_stop, half, overlaps, scale, table, heads_before,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
    OVERLAPS: tl.constexpr, COMPACT: tl.constexpr, FRESH: tl.constexpr, ADD_DQ: tl.constexpr, DESCRIPTORS: tl.constexpr,
    REDUCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dK and dV of ``KEYS`` keys of a (batch, kv head, segment); with ``ADD_DQ`` also to dQ, atomically.

    With ``REDUCE`` dQ is a descriptor, and the copy engine adds whole tiles. With ``FRESH`` dK and dV were not written
    yet.
    """
    program = tl.program_id(0)
    tile = program % tiles
    segment = first_segment + (program // tiles) % segments
    batch_head = program // tiles // segments
    batch, kv_head = batch_head // kv_heads, batch_head % kv_heads
    number = numbered(kv_head, heads_before)
    row, first, last, begin, keys = locate(
        segment, number, head_block, w, r, window_start, query_start, query_stop, key_stop, half, table
    )
    first_key = tile * KEYS
    if first_key >= keys:
        return
    key_rows = rows_of(row * 0 + begin, 1, 0) if COMPACT else rows_of(row + r * begin, r, 0)
    key_index = first_key + tl.arange(0, KEYS)
    key = load_tile(k, k_strides, batch, kv_head, key_rows, first_key, keys, KEYS, D, BLOCK_D, DESCRIPTORS)
    value = load_tile(v, v_strides, batch, kv_head, key_rows, first_key, keys, KEYS, D, BLOCK_D, DESCRIPTORS)
    dkey = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dvalue = tl.zeros([KEYS, BLOCK_D], tl.float32)
    factor = scale * LOG2_E
    key_columns, query_columns = 0, 0
    if OVERLAPS:
        key_columns = multiplicity_columns(
            begin + key_index, tl.arange(0, 16), number, r, factor, overlaps, True, key.dtype
        )
    rows = rows_of(row, r, first)
    # Masked: tiles of queries that see only some of the keys.
    masked = first
    if CAUSAL:
        first = tl.maximum(first, first_key)
        masked = first + tl.cdiv(tl.maximum(first_key + KEYS - 1 - first, 0), QUERIES) * QUERIES
    if first_key + KEYS > keys:
        masked = first + tl.cdiv(tl.maximum(last - first, 0), QUERIES) * QUERIES
    if OVERLAPS:  # the same for all tiles, which are a period apart
        index = first + tl.arange(0, QUERIES)
        query_columns = multiplicity_columns(index, tl.arange(0, 16), number, r, factor, overlaps, False, key.dtype).T
    # The query heads of a group share the key, so their parts are summed here.
    for member in range(group):
        head = kv_head * group + member
        for start in tl.range(first, tl.minimum(masked, last), QUERIES):
            dkey, dvalue = _add_queries(
                key, key_columns, query_columns, value, dkey, dvalue, dout, q, statistics, dq,
                dout_strides, q_strides, statistics_strides, dq_strides,
                batch, head, rows, start, last, key_index, keys, factor, scale, number, r, overlaps,
                D, BLOCK_D, QUERIES, CAUSAL, OVERLAPS, True, ADD_DQ, DESCRIPTORS, REDUCE, PRECISION,
            )  # fmt: skip
        for start in tl.range(masked, last, QUERIES):
            dkey, dvalue = _add_queries(
                key, key_columns, query_columns, value, dkey, dvalue, dout, q, statistics, dq,
                dout_strides, q_strides, statistics_strides, dq_strides,
                batch, head, rows, start, last, key_index, keys, factor, scale, number, r, overlaps,
                D, BLOCK_D, QUERIES, CAUSAL, OVERLAPS, False, ADD_DQ, DESCRIPTORS, REDUCE, PRECISION,
            )  # fmt: skip
    dkey *= scale
    mask = (key_index < keys)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    dk_pointers = pointers(dk, dk_strides, batch, kv_head, key_rows[0], key_rows[1], key_index, BLOCK_D)
    dv_pointers = pointers(dv, dv_strides, batch, kv_head, key_rows[0], key_rows[1], key_index, BLOCK_D)
    if not FRESH:
        dkey += tl.load(dk_pointers, mask=mask, other=0.0).to(tl.float32)
        dvalue += tl.load(dv_pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(dk_pointers, dkey.to(dk.dtype.element_ty), mask=mask)
    tl.store(dv_pointers, dvalue.to(dv.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=("r", "heads", "kv_heads"))
def query_gradient_kernel(
    dout, q, k, v, statistics, dq,
    dout_strides, q_strides, k_strides, v_strides, statistics_strides, dq_strides,
    tiles, segments, heads, group, head_block, w, r,
    first_segment, window_start, query_start, query_stop, key_stop, half, overlaps, scale, table, heads_before,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
    OVERLAPS: tl.constexpr, COMPACT: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dQ of ``QUERIES`` queries of a (batch, head, segment), in an order that never changes."""
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    segment = first_segment + (program // tiles) % segments
    batch_head = program // tiles // segments
    batch, head = batch_head // heads, batch_head % heads
    kv_head = head // group
    number = numbered(kv_head, heads_before)
    row, first, last, begin, keys = locate(
        segment, number, head_block, w, r, window_start, query_start, query_stop, key_stop, half, table
    )
    first += tile * QUERIES
    if first >= last:
        return
    rows = rows_of(row, r, first)
    key_rows = rows_of(row * 0 + begin, 1, 0) if COMPACT else rows_of(row + r * begin, r, 0)
    index = first + tl.arange(0, QUERIES)
    valid = index < last
    query = load_tile(q, q_strides, batch, head, rows, first, last, QUERIES, D, BLOCK_D, DESCRIPTORS)
    doutput = load_tile(dout, dout_strides, batch, head, rows, first, last, QUERIES, D, BLOCK_D, DESCRIPTORS)
    place = row_pointers(statistics, statistics_strides, batch, head, row, r, index)
    row_lse = tl.load(place, mask=valid, other=float("inf"))
    row_delta = tl.load(place + 1, mask=valid, other=0.0)
    dquery = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    factor = scale * LOG2_E
    query_columns, key_columns = 0, 0
    if OVERLAPS:
        query_columns = multiplicity_columns(index, tl.arange(0, 16), number, r, factor, overlaps, True, query.dtype)
        key_columns = multiplicity_columns(
            begin + tl.arange(0, KEYS), tl.arange(0, 16), number, r, factor, overlaps, False, query.dtype
        ).T
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, first + QUERIES)
    for start in tl.range(0, stop, KEYS):
        key = load_tile(k, k_strides, batch, kv_head, key_rows, start, keys, KEYS, D, BLOCK_D, DESCRIPTORS)
        value = load_tile(v, v_strides, batch, kv_head, key_rows, start, keys, KEYS, D, BLOCK_D, DESCRIPTORS)
        if OVERLAPS and KEYS % 64 != 0:
            key_columns = multiplicity_columns(
                begin + start + tl.arange(0, KEYS), tl.arange(0, 16), number, r, factor, overlaps, False, query.dtype
            ).T
        scores = scores_of(query, query_columns, key, key_columns, OVERLAPS, PRECISION)
        key_index = start + tl.arange(0, KEYS)
        weights = _weights(scores, row_lse[:, None], factor, key_index[None, :], index[:, None], keys, True, CAUSAL)
        # dP = dO Vᵀ, dS = P ∘ (dP - delta), dQ += dS K, and the factor scale once, behind the loop.
        gradient = tl.dot(doutput, value.T, input_precision=PRECISION)
        gradient = (weights * (gradient - row_delta[:, None])).to(key.dtype)
        dquery = tl.dot(gradient, key, dquery, input_precision=PRECISION)
    dquery *= scale
    mask = valid[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    dq_pointers = pointers(dq, dq_strides, batch, head, row, r, index, BLOCK_D)
    dquery += tl.load(dq_pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(dq_pointers, dquery.to(dq.dtype.element_ty), mask=mask)
