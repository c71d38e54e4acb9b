# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""A group of four warps of the Hopper backward: dK and dV of 64 keys, and its share of dQ."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longnet_dist.attention.kernels.hopper.backward.fetch import (
    FETCHERS,
    FREE,
    MULTIPLIERS,
    READY,
    SLOT_FREE,
    Work,
    query_tile,
    work_of_program,
)
from longnet_dist.attention.kernels.hopper.gluon_api import group_barrier, reinterpret
from longnet_dist.attention.kernels.hopper.instructions import (
    arrive,
    copies_read,
    lane_bit,
    meet,
    opaque_zero,
    reduce_add,
    uniform,
)
from longnet_dist.attention.kernels.hopper.masks import keep_before, keep_columns
from longnet_dist.attention.kernels.hopper.multiplicity import multiplicity_product, write_columns
from longnet_dist.attention.kernels.triton.tiles import numbered

LOG2_E = gl.constexpr(1.4426950408889634)
NEVER = gl.constexpr(2**30)  # an index behind all queries
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # (64 keys, 64 queries)
QUERY = gl.constexpr(gl.SliceLayout(0, SCORES.value))
KEY = gl.constexpr(gl.SliceLayout(1, SCORES.value))
STORED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # (64 keys, 64 columns), whole lines of memory
# The swizzle by 128 bytes of a (64, 64) tile of float32, with columns 16 apart exchanged in odd rows.
EXCHANGED = gl.constexpr(
    gl.SharedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [1, 20], [2, 8], [4, 16], [8, 0], [16, 0], [32, 0], [0, 32]], [], 1024
    )
)


class Results(NamedTuple):
    """What is added to: dQ's descriptor, pointers to dK and dV, all their strides, and rows a sequence has."""

    dq: Any
    dk: Any
    dv: Any
    dq_strides: Any
    dk_strides: Any
    dv_strides: Any
    rows: Any


class Target(NamedTuple):
    """Where in dQ's view the first query of the program stands, and columns from one head to the next."""

    dq: Any
    row: Any
    column: Any
    head: Any


@gluon.jit
def multiply(results, tiles, shape, group, scale, form, W: gl.constexpr):
    """Group ``W``, whose keys are the ``W``-th 64 of the tile."""
    dkey_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, form.D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    if form.ADDS_DQ:
        arrive(FREE + 1 - W + (2 if form.HALVES == 1 else 0), MULTIPLIERS)
    given = work_of_program(shape, group, form)
    first, first_key = uniform(given.first), uniform(given.first_key + W * 64)
    count, keys, num_tiles = uniform(given.count), uniform(given.keys), uniform(given.num_tiles)
    num_diagonal, tail = uniform(given.num_diagonal), uniform(given.tail)
    key_index = first_key + gl.arange(0, 64, KEY)
    seen_from = gl.where(key_index < keys, key_index - first if form.CAUSAL else 0, NEVER)
    work = Work(
        given.batch, given.kv_head, group, given.origin, given.begin, first_key, keys, first, count, num_tiles,
        num_diagonal, tail, num_diagonal + tail, seen_from,
    )  # fmt: skip
    target = _target(results, work, shape[5])
    dkey = gl.zeros([64, form.D], gl.float32, dkey_layout)
    dvalue = gl.zeros([64, form.D], gl.float32, dkey_layout)
    mbarrier.wait(tiles.key_ready, 0)
    key_rows, value_rows = tiles.key.index(W), tiles.value.index(W)
    if form.HALVES == 2:
        key_rows, value_rows = key_rows.load(operand), value_rows.load(operand)
    factor = scale * LOG2_E
    if form.OVERLAPS:  # of all tiles of queries, which are a period apart
        first_row, kv_head = given.begin + first_key, numbered(given.kv_head, shape[14])
        write_columns(tiles.key_columns.index(W), first_row, kv_head, shape[5], factor, shape[12], True)
        write_columns(tiles.query_columns.index(W), first, kv_head, shape[5], factor, shape[12], False)
        group_barrier()
    mbarrier.wait(tiles.ready.index(0), 0, pred=num_tiles > 0)
    scores = _scores(key_rows, tiles.q.index(0), tiles, form, W)
    scores = warpgroup_mma_wait(0, deps=[scores])
    for step in range(group * work.masked):
        scores, dkey, dvalue = _step(
            step, scores, dkey, dvalue, key_rows, value_rows, tiles, work, target, factor, scale, form, W, True
        )
    for step in range(group * work.masked, group * num_tiles):
        scores, dkey, dvalue = _step(
            step, scores, dkey, dvalue, key_rows, value_rows, tiles, work, target, factor, scale, form, W, False
        )
    steps = group * num_tiles
    if form.ADDS_DQ and form.HALVES == 1:
        _last_dquery(steps, tiles, work, target, form, W)
    if shape[13] is not None:  # anew: what is kept through the loops takes registers
        given = work_of_program(shape, group, form, opaque_zero())
        work = Work(
            given.batch, given.kv_head, group, given.origin, given.begin, given.first_key + W * 64, given.keys,
            given.first, given.count, given.num_tiles, given.num_diagonal, given.tail, given.masked, 0,
        )  # fmt: skip
    _add_key_gradients(results, dkey, dvalue, tiles.dq.index(W), work, shape[5], form)
    if form.ADDS_DQ:
        meet(FREE + W + ((steps + 1) % 2 * 2 if form.HALVES == 1 else 0), MULTIPLIERS)


@gluon.jit
def _fresh(number, form):
    """``number`` of a tile; where registers are few, in a form whose address is computed just before it is used.

    The compiler computes addresses early: before the loop, or those of several products before the first of them. Then
    they take registers of every thread instead of those that a warp shares.
    """
    if form.HALVES == 1:
        number += opaque_zero()
    return number


@gluon.jit
def _target(results, work, r):
    query_row = work.batch.to(gl.int64) * results.rows + work.origin + r * work.first
    head = results.dq_strides[2]
    column = (query_row % r).to(gl.int32) * results.dq_strides[1] + work.kv_head * work.group * head
    return Target(results.dq, uniform((query_row // r).to(gl.int32)), uniform(column), head)


@gluon.jit
def _scores(key_rows, query, tiles, form, W: gl.constexpr):
    """Scores of a group's keys and 64 queries, with multiplicities, to be waited for."""
    scores = gl.zeros([64, 64], gl.float32, SCORES)
    scores = multiplicity_product(tiles.key_columns.index(W), tiles.query_columns.index(W), scores, form.OVERLAPS)
    return warpgroup_mma(key_rows, query.permute((1, 0)), scores, use_acc=form.OVERLAPS, is_async=True)


@gluon.jit
def _transposed_product(rows, tile):
    """``rows · tileᵀ`` ``(64, 64)``, to be waited for."""
    nothing = gl.zeros([64, 64], gl.float32, SCORES)
    return warpgroup_mma(rows, tile.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _step(
    step, scores, dkey, dvalue, key_rows, value_rows, tiles, work, target, factor, scale, form,
    W: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One query tile against the keys of group ``W``, all transposed: 64 queries, one or two times.

    ``scores`` are those of its first 64 queries; returned are those of the next step. With two times 64 queries the
    group that computes dQ of one of them wants dS of both groups for it; with 64, each computes half of the columns,
    and of the step before, so that neither group waits for the other.
    """
    operand: gl.constexpr = gl.DotOperandLayout(0, dkey.type.layout, 2)
    slot = step % form.STAGES
    if form.HALVES == 1:  # too few registers for K and V
        value_rows = tiles.value.index(_fresh(W, form))
    _, start = query_tile(step, work, form)
    tile = slot * form.HALVES
    gradient = _transposed_product(value_rows, tiles.dout.index(_fresh(tile, form)))
    weights, delta, dvalue = _weigh(scores, tile, start, dvalue, tiles, work, factor, scale, form, MASKED)
    gradient = warpgroup_mma_wait(1, deps=[gradient])
    ds = (weights * (gradient * scale - delta[None, :])).to(tiles.key.dtype)
    if form.HALVES == 2:
        ds, dkey, dvalue = _second_half(
            ds, tile, start, dkey, dvalue, key_rows, value_rows, tiles, work, factor, scale, form, W, MASKED
        )
    now, before = 0, 0  # which of two buffers of dS
    if form.HALVES == 1:
        now, before = step % 2, (step + 1) % 2
    dquery = 0
    if form.ADDS_DQ:
        if form.HALVES == 1 or W == 0:
            _hand_over(ds, tiles.late_ds.index(2 * now + W), now, before, W)
        else:
            tiles.late_ds.index(W).store(ds)
            fence_async_shared()
        copies_read()
        group_barrier()  # in the group: dS is written, the tile of dQ is free
        if form.HALVES == 2:
            meet(READY + W, MULTIPLIERS)
        elif step > 0:
            meet(READY + W + 2 * before, MULTIPLIERS)
        dquery = _dquery(tiles, 2 * before, form, W)
    elif form.HALVES == 1:
        tiles.late_ds.index(2 * now + W).store(ds)
        fence_async_shared()
        group_barrier()
    if form.HALVES == 2:
        dkey = warpgroup_mma(gl.convert_layout(ds, operand), tiles.q.index(tile + 1), dkey, is_async=True)
    else:  # too few registers to hold dS
        own_ds, query = tiles.late_ds.index(_fresh(2 * now + W, form)), tiles.q.index(_fresh(tile, form))
        dkey = warpgroup_mma(own_ds, query, dkey, is_async=True)
    later = step + 1  # after the last step: scores of some old tile
    bar, parity = tiles.ready.index(later % form.STAGES), (later // form.STAGES) % 2
    mbarrier.wait(bar, parity, pred=later < work.group * work.num_tiles)
    if form.HALVES == 1:
        key_rows = tiles.key.index(_fresh(W, form))
    scores = _scores(key_rows, tiles.q.index(_fresh(later % form.STAGES * form.HALVES, form)), tiles, form, W)
    PRODUCTS: gl.constexpr = 1 + form.OVERLAPS  # of the scores
    if form.ADDS_DQ:
        dquery, dvalue = warpgroup_mma_wait(PRODUCTS + 1, deps=[dquery, dvalue])
        arrive(FREE + 1 - W + 2 * now, MULTIPLIERS)
        _stage_dquery(tiles.dq.index(W), dquery, form)
        if form.HALVES == 2:
            _add_dquery(step, tiles, work, target, form, W)
        elif step > 0:
            _add_dquery(step - 1, tiles, work, target, form, W)
        scores, dkey = warpgroup_mma_wait(0, deps=[scores, dkey])
    else:
        scores, dkey, dvalue = warpgroup_mma_wait(0, deps=[scores, dkey, dvalue])
    arrive(SLOT_FREE + slot, MULTIPLIERS + FETCHERS)
    return scores, dkey, dvalue


@gluon.jit
def _second_half(
    ds, tile, start, dkey, dvalue, key_rows, value_rows, tiles, work, factor, scale, form,
    W: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """dS of the first 64 queries of a step to its place and to dK, then that of the others."""
    operand: gl.constexpr = gl.DotOperandLayout(0, dkey.type.layout, 2)
    if form.ADDS_DQ:
        if W == 1:
            _hand_over(ds, tiles.early_ds.index(W), 0, 0, W)
        else:
            tiles.early_ds.index(W).store(ds)
    scores = _scores(key_rows, tiles.q.index(tile + 1), tiles, form, W)
    dkey = warpgroup_mma(gl.convert_layout(ds, operand), tiles.q.index(tile), dkey, is_async=True)
    gradient = _transposed_product(value_rows, tiles.dout.index(tile + 1))
    scores, dvalue = warpgroup_mma_wait(2, deps=[scores, dvalue])
    weights, delta, dvalue = _weigh(scores, tile + 1, start + 64, dvalue, tiles, work, factor, scale, form, MASKED)
    gradient, dkey = warpgroup_mma_wait(1, deps=[gradient, dkey])
    return (weights * (gradient * scale - delta[None, :])).to(tiles.key.dtype), dkey, dvalue


@gluon.jit
def _weigh(scores, tile, start, dvalue, tiles, work, factor, scale, form, MASKED: gl.constexpr):
    """P of the keys and the 64 queries from ``start`` on, which stand in ``tile``; their delta; dV, not waited for."""
    operand: gl.constexpr = gl.DotOperandLayout(0, dvalue.type.layout, 2)
    lse = tiles.lse.index(tile).load(QUERY)
    if MASKED:  # a query behind the last one weighs nothing
        lse = keep_before(lse, work.count - start, float("inf"))
    weights = gl.exp2(scores * factor - lse[None, :])
    if MASKED:
        if form.CAUSAL:
            weights = keep_columns(weights, work.seen_from - start, None, 0.0)
        else:
            weights = gl.where((work.seen_from < NEVER)[:, None], weights, 0.0)
    narrow = gl.convert_layout(weights.to(tiles.key.dtype), operand)
    dvalue = warpgroup_mma(narrow, tiles.dout.index(_fresh(tile, form)), dvalue, is_async=True)
    return weights, tiles.delta.index(tile).load(QUERY) * scale, dvalue


@gluon.jit
def _hand_over(ds, tile, now, before, W: gl.constexpr):
    """Write dS where the other group reads it, once that has read what stood there."""
    meet(FREE + W + 2 * before, MULTIPLIERS)
    tile.store(ds)
    fence_async_shared()
    arrive(READY + 1 - W + 2 * now, MULTIPLIERS)


@gluon.jit
def _dquery(tiles, tile, form, W: gl.constexpr):
    """Of group ``W``: dQ of its 64 queries, or its 64 columns, from dS in ``tile`` and the next."""
    dquery = gl.zeros([64, 64], gl.float32, SCORES)
    ds = tiles.late_ds
    if form.HALVES == 2 and W == 0:
        ds = tiles.early_ds
    for half in gl.static_range(2):
        zero = opaque_zero()
        if form.HALVES == 1:  # 64 columns of 64 keys are a tile in shared memory
            parts = reinterpret(tiles.key, tiles.key.dtype, [form.D // 32, 64, 64], tiles.key.type.layout)
            keys = parts.index(2 * half + W + zero)
        else:
            keys = tiles.key.index(half + zero)
        part = ds.index(tile + half + zero).permute((1, 0))
        dquery = warpgroup_mma(part, keys, dquery, use_acc=half == 1, is_async=True)
    return dquery


@gluon.jit
def _last_dquery(steps, tiles, work, target, form, W: gl.constexpr):
    """Where dQ comes a step later: that of the last step."""
    last = (steps + 1) % 2
    if steps > 0:
        meet(READY + W + 2 * last, MULTIPLIERS)
    dquery = _dquery(tiles, 2 * last, form, W)
    copies_read()
    dquery = warpgroup_mma_wait(0, deps=[dquery])
    group_barrier()
    _stage_dquery(tiles.dq.index(W), dquery, form)
    if steps > 0:
        _add_dquery(steps - 1, tiles, work, target, form, W)


@gluon.jit
def _stage_dquery(tile, dquery, form):
    """Write dQ for the copy engine, odd rows in another order: no two of four rows meet in a bank of shared memory."""
    row = gl.arange(0, 64, KEY)
    odd = row % 2 == 1
    if form.HALVES == 1:  # read anew for each tile, it takes no register in between; four threads have a row
        odd = lane_bit(row * 0, 2) == 1
    left, right = dquery.reshape(64, 2, 2, 16).permute(0, 1, 3, 2).split()
    exchanged = gl.join(right, left).permute(0, 1, 3, 2).reshape(64, 64)
    dquery = gl.where(odd[:, None], gl.convert_layout(exchanged, SCORES, assert_trivial=True), dquery)
    reinterpret(tile, gl.float32, [64, 64], EXCHANGED).store(dquery)
    fence_async_shared()
    group_barrier()


@gluon.jit
def _add_dquery(step, tiles, work, target, form, W: gl.constexpr):
    member, start = query_tile(step, work, form)
    row, column = target.row + start, target.column + member * target.head
    if form.HALVES == 2:
        row += W * 64
    else:
        column += W * 64
    reduce_add(target.dq, [row, column], tiles.dq.index(W))


@gluon.jit
def _add_key_gradients(results, dkey, dvalue, tile, work, r, form):
    index = (work.first_key + gl.arange(0, 64, gl.SliceLayout(1, STORED))).to(gl.int64)
    valid = index < work.keys
    index += work.begin
    if not form.COMPACT:
        index = work.origin + r * index
    tma.store_wait(0)
    _add(results.dk, results.dk_strides, dkey, tile, work, index, valid, form)
    _add(results.dv, results.dv_strides, dvalue, tile, work, index, valid, form)


@gluon.jit
def _add(total, strides, part, tile, work, rows, valid, form):
    """``total[batch, rows, head] += part``, or ``=`` with ``FRESH``, 64 columns at a time by way of ``tile``."""
    columns = gl.arange(0, 64, gl.SliceLayout(0, STORED))
    total += work.batch.to(gl.int64) * strides[0] + work.kv_head.to(gl.int64) * strides[2]
    pointers = total + (rows * strides[1])[:, None] + columns[None, :]
    mask = valid[:, None] & (columns < 64)[None, :]
    if form.D == 64:
        _add_columns(pointers, mask, part, tile, form)
    else:
        left, right = part.reshape(64, 2, 64).permute(0, 2, 1).split()
        _add_columns(pointers, mask, gl.convert_layout(left, SCORES, assert_trivial=True), tile, form)
        _add_columns(pointers + 64, mask, gl.convert_layout(right, SCORES, assert_trivial=True), tile, form)


@gluon.jit
def _add_columns(pointers, mask, part, tile, form):
    tile.store(part)
    part = tile.load(STORED)
    if not form.FRESH:
        part += gl.load(pointers, mask=mask, other=0.0).to(gl.float32)
    gl.store(pointers, part.to(pointers.dtype.element_ty), mask=mask)
