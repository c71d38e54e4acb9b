# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""dK, dV and dQ of one piece in one launch on Hopper: the asynchronous matrix units and the copy engine, by hand.

The arithmetic is that of ``triton_backward.key_gradient_kernel``; what differs is the order. The compiler's own
schedule waits for every matrix product before it goes on. Here the exponentials run beside ``V dOᵀ``, dS beside
``Pᵀ dO``, the addition to dQ beside ``dSᵀ Q``, and warps of their own fetch the tiles of queries one step ahead.
"""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from longnet_dist.kernels.triton_tiles import UNSPECIALIZED, locate

LOG2_E = gl.constexpr(1.4426950408889634)


@builtin
def _reduce_add(descriptor, position, source, _semantic=None):
    """Let the copy engine add a tile in shared memory to global memory."""
    coordinates = _semantic._convert_to_ir_values(position, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, source.handle
    )


@gluon.jit
def _turn(step, masked, num_diagonal, tail, num_tiles, group, QUERIES: gl.constexpr, GROUPED: gl.constexpr):
    """``(head of the group, first query)`` of a step: tiles on the diagonal and the short last one come first."""
    early = step < group * masked
    turn = gl.where(early, step, step - group * masked)
    tiles = gl.where(early, masked, num_tiles - masked)
    member = turn * 0
    if GROUPED:
        member = turn // tiles
    x = turn - member * tiles
    last = (tail > 0) & (x == num_diagonal)
    tile = gl.where(early, gl.where(last, num_tiles - 1, x), x + num_diagonal)
    return member, tile * QUERIES


@gluon.jit
def _produce(
    q, k, v, dout, key, value, q_tiles, dout_tiles, lse_tiles, delta_tiles, key_ready, ready, free,
    statistics, statistics_step, statistics_head, key_tile, k_column, v_column, row, q_column, q_head, dout_column,
    dout_head, group, masked, num_diagonal, tail, num_tiles, count,
    QUERIES: gl.constexpr, STAGES: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """The warps that fetch: the keys and values, then query tile after query tile of every head of the group."""
    mbarrier.expect(key_ready, k.block_type.nbytes + v.block_type.nbytes)
    tma.async_copy_global_to_shared(k, [key_tile, k_column], key_ready, key)
    tma.async_copy_global_to_shared(v, [key_tile, v_column], key_ready, value)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    HALVES: gl.constexpr = QUERIES // 64
    for step in range(group * num_tiles):
        slot = step % STAGES
        bar = ready.index(slot)
        mbarrier.wait(free.index(slot), (step // STAGES) % 2 ^ 1)
        member, start = _turn(step, masked, num_diagonal, tail, num_tiles, group, QUERIES, GROUPED)
        index = start + gl.arange(0, QUERIES, layout)
        pointers = statistics + member * statistics_head + index.to(gl.int64) * statistics_step
        async_copy.async_copy_global_to_shared(lse_tiles.index(slot), pointers, index < count)
        async_copy.async_copy_global_to_shared(delta_tiles.index(slot), pointers + 1, index < count)
        async_copy.mbarrier_arrive(bar, increment_count=False)
        mbarrier.expect(bar, (q.block_type.nbytes + dout.block_type.nbytes) * HALVES)
        for half in gl.static_range(HALVES):
            place, tile = row + start + half * 64, slot * HALVES + half
            tma.async_copy_global_to_shared(q, [place, q_column + member * q_head], bar, q_tiles.index(tile))
            tma.async_copy_global_to_shared(
                dout, [place, dout_column + member * dout_head], bar, dout_tiles.index(tile)
            )


@gluon.jit
def _weights(
    scores, lse, factor, start, first, first_key, keys, count,
    KEYS: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """P of the keys and the 64 queries from ``start`` on."""
    weights = gl.exp2(scores * factor - lse[None, :])
    if MASKED:
        key_index = first_key + gl.arange(0, KEYS, gl.SliceLayout(1, layout))
        index = start + gl.arange(0, 64, gl.SliceLayout(0, layout))
        seen = (key_index < keys)[:, None] & (index < count)[None, :]
        if CAUSAL:
            seen = seen & (key_index[:, None] <= first + index[None, :])
        weights = gl.where(seen, weights, 0.0)
    return weights


@gluon.jit
def _step(
    step, dkey, dvalue, key, key_rows, value, q_tiles, dout_tiles, lse_tiles, delta_tiles, gradients, dq_tile,
    ready, free, dq, row, dq_column, dq_head, group, first, first_key, keys, masked, num_diagonal, tail, num_tiles,
    count, factor, scale,
    KEYS: gl.constexpr, QUERIES: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr,
    STAGES: gl.constexpr, GROUPED: gl.constexpr, score_layout: gl.constexpr,
    dkey_layout: gl.constexpr, dq_layout: gl.constexpr, gradients_layout: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """One query tile against the key tile, all transposed: scores ``(KEYS, 64)``, one or two times 64 queries."""
    column: gl.constexpr = gl.SliceLayout(0, score_layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, dkey_layout, 2)
    HALVES: gl.constexpr = QUERIES // 64
    nothing = gl.zeros([KEYS, 64], gl.float32, score_layout)
    slot = step % STAGES
    member, start = _turn(step, masked, num_diagonal, tail, num_tiles, group, QUERIES, GROUPED)
    tile = slot * HALVES
    query, doutput = q_tiles.index(tile), dout_tiles.index(tile)
    mbarrier.wait(ready.index(slot), (step // STAGES) % 2)
    scores = warpgroup_mma(key_rows, query.permute((1, 0)), nothing, use_acc=False, is_async=True)
    gradient = warpgroup_mma(value, doutput.permute((1, 0)), nothing, use_acc=False, is_async=True)
    lse = lse_tiles.index(tile).load(column)
    scores, dkey = warpgroup_mma_wait(1, deps=[scores, dkey])  # dkey: of the step before
    weights = _weights(scores, lse, factor, start, first, first_key, keys, count, KEYS, CAUSAL, MASKED, score_layout)
    dvalue = warpgroup_mma(gl.convert_layout(weights.to(DTYPE), operand), doutput, dvalue, is_async=True)
    delta = delta_tiles.index(tile).load(column) * scale
    gradient = warpgroup_mma_wait(1, deps=[gradient])
    gradient = (weights * (gradient * scale - delta[None, :])).to(DTYPE)
    gradients.index(0).store(gradient)
    if HALVES == 2:
        first_query, query, doutput = query, q_tiles.index(tile + 1), dout_tiles.index(tile + 1)
        scores = warpgroup_mma(key_rows, query.permute((1, 0)), nothing, use_acc=False, is_async=True)
        dkey = warpgroup_mma(gl.convert_layout(gradient, operand), first_query, dkey, is_async=True)
        gradient = warpgroup_mma(value, doutput.permute((1, 0)), nothing, use_acc=False, is_async=True)
        lse = lse_tiles.index(tile + 1).load(column)
        scores, dvalue = warpgroup_mma_wait(2, deps=[scores, dvalue])
        weights = _weights(
            scores, lse, factor, start + 64, first, first_key, keys, count, KEYS, CAUSAL, MASKED, score_layout
        )
        dvalue = warpgroup_mma(gl.convert_layout(weights.to(DTYPE), operand), doutput, dvalue, is_async=True)
        delta = delta_tiles.index(tile + 1).load(column) * scale
        gradient, dkey = warpgroup_mma_wait(1, deps=[gradient, dkey])
        gradient = (weights * (gradient * scale - delta[None, :])).to(DTYPE)
        gradients.index(1).store(gradient)
    fence_async_shared()
    tma.store_wait(0)
    gl.thread_barrier()  # in all warps: dS is written, all products of the step before are done, dq_tile is free
    mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=step > 0)
    dquery = gl.zeros([QUERIES, D], gl.float32, dq_layout)
    all_gradients = gradients._reinterpret(DTYPE, [KEYS, QUERIES], gradients_layout)
    dquery = warpgroup_mma(all_gradients.permute((1, 0)), key, dquery, use_acc=False, is_async=True)
    if D == 64:
        dkey = warpgroup_mma(gl.convert_layout(gradient, operand), query, dkey, is_async=True)
    else:  # too few registers to hold dS
        dkey = warpgroup_mma(gradients.index(HALVES - 1), query, dkey, is_async=True)
    dquery, dvalue = warpgroup_mma_wait(1, deps=[dquery, dvalue])
    dq_tile.store(dquery)
    fence_async_shared()
    gl.thread_barrier()
    _reduce_add(dq, [row + start, dq_column + member * dq_head], dq_tile)
    return dkey, dvalue


@gluon.jit
def _consume(
    key, value, q_tiles, dout_tiles, lse_tiles, delta_tiles, gradients, dq_tile, key_ready, ready, free, dq,
    row, dq_column, dq_head, group, first, first_key, keys, masked, num_diagonal, tail, num_tiles, count, scale,
    KEYS: gl.constexpr, QUERIES: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
    GROUPED: gl.constexpr, DTYPE: gl.constexpr, KEY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """The warps that compute: ``(dK, dV)`` ``(KEYS, D)``."""
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 4 if QUERIES == 64 else WARPS
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 64, 16])
    dkey_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS, WARPS // ROWS], [16, D * ROWS // WARPS, 16])
    gradients_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, QUERIES], DTYPE)
    operand: gl.constexpr = gl.DotOperandLayout(0, score_layout, 2)
    factor = scale * LOG2_E
    dkey = warpgroup_mma_init(gl.zeros([KEYS, D], gl.float32, dkey_layout))
    dvalue = gl.zeros([KEYS, D], gl.float32, dkey_layout)
    mbarrier.wait(key_ready, 0)
    key_rows = key
    if KEY_REGISTERS:
        key_rows = key.load(operand)
    for step in range(group * masked):
        dkey, dvalue = _step(
            step, dkey, dvalue, key, key_rows, value, q_tiles, dout_tiles, lse_tiles, delta_tiles, gradients,
            dq_tile, ready, free, dq, row, dq_column, dq_head, group, first, first_key, keys, masked, num_diagonal,
            tail, num_tiles, count, factor, scale, KEYS, QUERIES, D, CAUSAL, True, STAGES, GROUPED,
            score_layout, dkey_layout, dq_layout, gradients_layout, DTYPE,
        )  # fmt: skip
    for step in range(group * masked, group * num_tiles):
        dkey, dvalue = _step(
            step, dkey, dvalue, key, key_rows, value, q_tiles, dout_tiles, lse_tiles, delta_tiles, gradients,
            dq_tile, ready, free, dq, row, dq_column, dq_head, group, first, first_key, keys, masked, num_diagonal,
            tail, num_tiles, count, factor, scale, KEYS, QUERIES, D, CAUSAL, False, STAGES, GROUPED,
            score_layout, dkey_layout, dq_layout, gradients_layout, DTYPE,
        )  # fmt: skip
    dkey = warpgroup_mma_wait(0, deps=[dkey])
    tma.store_wait(0)
    return dkey, dvalue


@gluon.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=("r", "kv_heads"))
def hopper_backward_kernel(
    dout, q, k, v, statistics, dq, dk, dv,
    rows, key_rows,
    dout_strides, q_strides, k_strides, v_strides, statistics_strides, dq_strides, dk_strides, dv_strides,
    tiles, segments, kv_heads, group, head_block, w, r,
    first_segment, window_start, query_start, query_stop, key_stop, scale,
    D: gl.constexpr, QUERIES: gl.constexpr, KEYS: gl.constexpr, CAUSAL: gl.constexpr, COMPACT: gl.constexpr,
    GROUPED: gl.constexpr, FRESH: gl.constexpr, STAGES: gl.constexpr, KEY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Adds to dK and dV of ``KEYS`` keys of a (batch, kv head, segment), and to dQ through the copy engine.

    ``q, k, v, dout, dq`` are descriptors of the view ``(B·rows / r, r·row_stride)``. ``statistics`` ``(B, n, H, 2)``
    holds lse in units of log 2, and delta. With ``FRESH`` dK and dV were not written yet.
    """
    program = gl.program_id(0)
    first_key = program % tiles * KEYS
    segment = first_segment + (program // tiles) % segments
    batch_head = program // tiles // segments
    batch, kv_head = batch_head // kv_heads, batch_head % kv_heads
    origin, first, last, keys = locate(
        segment, kv_head, head_block, w, r, window_start, query_start, query_stop, key_stop
    )
    if CAUSAL:
        first = gl.maximum(first, first_key)
    count = gl.where(first_key < keys, gl.maximum(last - first, 0), 0)
    num_tiles = gl.cdiv(count, QUERIES)
    num_diagonal = num_tiles * 0
    if CAUSAL:
        num_diagonal = gl.minimum(gl.cdiv(gl.maximum(first_key + KEYS - 1 - first, 0), QUERIES), num_tiles)
    num_diagonal = gl.where(first_key + KEYS > keys, num_tiles, num_diagonal)
    tail = ((count % QUERIES != 0) & (num_diagonal < num_tiles)).to(gl.int32)
    masked = num_diagonal + tail
    first_row = origin + r * first
    query_row = batch.to(gl.int64) * rows + first_row
    key_row, step = batch.to(gl.int64) * key_rows + first_key, 1
    if not COMPACT:
        key_row, step = key_row + origin + (r - 1) * first_key, r
    key_tile, key_column = (key_row // step).to(gl.int32), (key_row % step).to(gl.int32)
    column = (query_row % r).to(gl.int32)
    head = kv_head * group

    DTYPE: gl.constexpr = q.dtype
    HALVES: gl.constexpr = QUERIES // 64
    score_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, 64], DTYPE)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    key = gl.allocate_shared_memory(DTYPE, [KEYS, D], k.layout)
    value = gl.allocate_shared_memory(DTYPE, [KEYS, D], v.layout)
    q_tiles = gl.allocate_shared_memory(DTYPE, [STAGES * HALVES, 64, D], q.layout)
    dout_tiles = gl.allocate_shared_memory(DTYPE, [STAGES * HALVES, 64, D], dout.layout)
    gradients = gl.allocate_shared_memory(DTYPE, [HALVES, KEYS, 64], score_tile)
    dq_tile = gl.allocate_shared_memory(gl.float32, [QUERIES, D], dq.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES], vector)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES], vector)
    lse_halves = lse_tiles._reinterpret(gl.float32, [STAGES * HALVES, 64], vector)
    delta_halves = delta_tiles._reinterpret(gl.float32, [STAGES * HALVES, 64], vector)
    key_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(key_ready, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1 + 128)  # the copy engine, and the copies of 128 threads
        mbarrier.init(free.index(slot), count=1)
    fence_async_shared()
    row = (query_row // r).to(gl.int32)
    statistics += batch.to(gl.int64) * statistics_strides[0] + head.to(gl.int64) * statistics_strides[2]
    dkey, dvalue = gl.warp_specialize(
        [
            (
                _consume,
                (
                    key, value, q_tiles, dout_tiles, lse_halves, delta_halves, gradients, dq_tile, key_ready, ready,
                    free, dq, row, column * dq_strides[1] + head * dq_strides[2], dq_strides[2], group, first,
                    first_key, keys, masked, num_diagonal, tail, num_tiles, count, scale, KEYS, QUERIES, D, CAUSAL,
                    STAGES, GROUPED, DTYPE, KEY_REGISTERS,
                ),
            ),
            (
                _produce,
                (
                    q, k, v, dout, key, value, q_tiles, dout_tiles, lse_tiles, delta_tiles, key_ready, ready, free,
                    statistics + first_row * statistics_strides[1], r * statistics_strides[1], statistics_strides[2],
                    key_tile, key_column * k_strides[1] + kv_head * k_strides[2],
                    key_column * v_strides[1] + kv_head * v_strides[2], row,
                    column * q_strides[1] + head * q_strides[2], q_strides[2],
                    column * dout_strides[1] + head * dout_strides[2], dout_strides[2],
                    group, masked, num_diagonal, tail, num_tiles, count, QUERIES, STAGES, GROUPED,
                ),
            ),
        ],
        [4],
        [24],
    )  # fmt: skip

    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    index = first_key + gl.arange(0, KEYS, gl.SliceLayout(1, layout))
    row_index = index.to(gl.int64)
    if not COMPACT:
        row_index = origin + r * row_index
    _add(dk, dk_strides, batch, kv_head, row_index, index < keys, gl.convert_layout(dkey, layout), D, FRESH)
    _add(dv, dv_strides, batch, kv_head, row_index, index < keys, gl.convert_layout(dvalue, layout), D, FRESH)


@gluon.jit
def _add(total, strides, batch, head, rows, valid, part, D: gl.constexpr, FRESH: gl.constexpr):
    """``total[batch, rows, head] += part``, or ``=`` with ``FRESH``."""
    columns = gl.arange(0, D, gl.SliceLayout(0, part.type.layout))
    total += batch.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[2]
    pointers = total + (rows * strides[1])[:, None] + columns[None, :]
    mask = valid[:, None] & (columns < D)[None, :]
    if not FRESH:
        part += gl.load(pointers, mask=mask, other=0.0).to(gl.float32)
    gl.store(pointers, part.to(total.dtype.element_ty), mask=mask)
