# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""A group of four warps of the Hopper forward: 64 queries of every tile of its program."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longnet_dist.attention.kernels.hopper.backward.fetch import FETCHERS, MULTIPLIERS
from longnet_dist.attention.kernels.hopper.backward.multiply import LOG2_E
from longnet_dist.attention.kernels.hopper.forward.fetch import (
    FREE,
    Work,
    fetch_tile,
    places_of,
    query_slot,
    steps,
    work_of_turn,
)
from longnet_dist.attention.kernels.hopper.gluon_api import group_barrier, reinterpret, store_block
from longnet_dist.attention.kernels.hopper.instructions import arrive, copies_read, uniform
from longnet_dist.attention.kernels.hopper.masks import keep_columns
from longnet_dist.attention.kernels.hopper.multiplicity import multiplicity_product, write_columns
from longnet_dist.attention.kernels.triton.tiles import numbered


class Results(NamedTuple):
    """Pointers to ``out`` and ``lse``, and the strides of ``lse``."""

    out: Any
    lse: Any
    lse_strides: Any


class Softmax(NamedTuple):
    """The softmax so far, with scores and maxima in units of log 2.

    Attributes:
        weights: of the last tile, not yet in ``result``; ``maximum``, ``total``: of each query; ``result``: the sum.
    """

    weights: Any
    maximum: Any
    total: Any
    result: Any


@gluon.constexpr_function
def _scores_layout(keys):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, keys, 16])


@gluon.jit
def multiply(sources, results, tiles, shape, scale, form, W: gl.constexpr):
    """Group ``W``, whose queries are the ``W``-th 64 of each tile."""
    base, done = 0, 0
    work, all_seen = _work(0, shape, form, W)
    if form.OVERLAPS:  # of all tiles of the program, which are a period apart
        first, factor = work_of_turn(0, shape, form).first, scale * LOG2_E  # which is there without work, too
        kv_head = numbered(work.kv_head, shape[15])
        write_columns(tiles.query_columns.index(W), first, kv_head, work.r, factor, shape[13], True)
        write_columns(tiles.key_columns.index(W), work.begin, kv_head, work.r, factor, shape[13], False)
        group_barrier()
    scores = _begin(work, all_seen, base, done, tiles, form, W)
    scores = _end(scores, work, all_seen, base, form)
    for turn in range(form.TURNS):
        later, later_seen = _work(turn + 1, shape, form, W)
        if work.keys > 0:
            base = uniform(base)
            lse_pointers, old = _running(results, work, form)
            state = _attend(scores, tiles, work, all_seen, base, done, scale * LOG2_E, form, W)
            result, operand, slot = _last_sum(base + all_seen - 1, done, state, tiles, form, W)
            # The first scores of the next tile stand beside the end of this one.
            ahead = _begin(later, later_seen, base + all_seen, done + 1, tiles, form, W)
            result, operand = warpgroup_mma_wait(1 + form.OVERLAPS, deps=[result, operand])
            _leave(form.STAGES + slot, form)
            state = Softmax(state.weights, state.maximum, state.total, result)
            _finish(sources, results, tiles, state, lse_pointers, old, work, done, scale * LOG2_E, form, W)
            base, done = base + all_seen, done + 1
            scores = _end(ahead, later, later_seen, base, form)
        else:
            scores = _end(_begin(later, later_seen, base, done, tiles, form, W), later, later_seen, base, form)
        work, all_seen = later, later_seen
    copies_read()


@gluon.jit
def _work(turn, shape, form, W: gl.constexpr):
    """The ``turn``-th tile of the group, and how many tiles of keys the program sees of it."""
    given = work_of_turn(turn, shape, form)
    keys = gl.where(turn < form.TURNS, given.keys, 0)
    begin = gl.where(keys > 0, given.first, 0)
    all_seen, _full = steps(begin, keys, 128, form)
    first, keys, all_seen = uniform(begin + 64 * W), uniform(keys), uniform(all_seen)
    return Work(
        given.batch, given.head, given.kv_head, given.origin, given.r, given.begin, first, given.last, keys
    ), all_seen


@gluon.jit
def _begin(work, all_seen, base, done, tiles, form, W: gl.constexpr):
    """The first scores of a tile, or none of any use without a tile."""
    seen, _full = steps(work.first, work.keys, 64, form)
    for step in range(all_seen - seen):  # tiles that only later groups see
        _skip_keys(base + step, tiles, form)
    position = base + all_seen - seen
    slot = position % form.STAGES
    number, phase = query_slot(done)
    mbarrier.wait(tiles.q_ready.index(number + W), phase, pred=work.keys > 0)
    mbarrier.wait(tiles.k_ready.index(slot), position // form.STAGES % 2, pred=work.keys > 0)
    return _scores(tiles.q.index(number + W), tiles.k.index(slot), tiles, form, W)


@gluon.jit
def _scores(query, key, tiles, form, W: gl.constexpr):
    """Scores with multiplicities, to be waited for."""
    KEYS: gl.constexpr = key.shape[0]
    scores = gl.zeros([64, KEYS], gl.float32, _scores_layout(KEYS))
    scores = multiplicity_product(tiles.query_columns.index(W), tiles.key_columns.index(W), scores, form.OVERLAPS)
    return warpgroup_mma(query, key.permute((1, 0)), scores, use_acc=form.OVERLAPS, is_async=True)


@gluon.jit
def _end(scores, work, all_seen, base, form):
    scores = warpgroup_mma_wait(0, deps=[scores])
    seen, _full = steps(work.first, work.keys, 64, form)
    if work.keys > 0:
        _leave((base + all_seen - seen) % form.STAGES, form)
    return scores


@gluon.jit
def _running(results, work, form):
    """Pointers to the running lse of the queries, and its values in units of log 2."""
    rows: gl.constexpr = gl.SliceLayout(1, _scores_layout(form.KEYS))
    index = work.first + gl.arange(0, 64, rows)
    pointers = results.lse + work.batch.to(gl.int64) * results.lse_strides[0]
    pointers += work.head.to(gl.int64) * results.lse_strides[2]
    pointers += (work.origin + work.r * index.to(gl.int64)) * results.lse_strides[1]
    old = gl.full([64], -float("inf"), gl.float32, rows)
    if not form.FRESH:
        old = gl.load(pointers, mask=index < work.last, other=0.0) * LOG2_E
    return pointers, old


@gluon.jit
def _attend(scores, tiles, work, all_seen, base, done, factor, form, W: gl.constexpr):
    """One tile: from the last tile of keys, the masked ones, to the first."""
    seen, full = steps(work.first, work.keys, 64, form)
    seen, full = uniform(seen), uniform(full)
    skipped = all_seen - seen
    position = base + skipped
    number, _phase = query_slot(done)
    query = tiles.q.index(number + W)
    state = _first_weights(scores, seen - 1, tiles, work, done, factor, form, W)
    for step in range(skipped):
        slot = (base + step) % form.STAGES
        mbarrier.wait(tiles.v_ready.index(slot), (base + step) // form.STAGES % 2)
        _leave(form.STAGES + slot, form)
    for step in range(1, seen - full):
        state = _step(position + step, seen - 1 - step, state, query, tiles, work, factor, form, W, True)
    level = gl.where(state.maximum == -float("inf"), 0.0, state.maximum)
    state = Softmax(state.weights, level, state.total, state.result)
    for step in range(seen - full, seen):
        state = _step(position + step, seen - 1 - step, state, query, tiles, work, factor, form, W, False)
    return state


@gluon.jit
def _finish(sources, results, tiles, state, lse_pointers, old, work, done, factor, form, W: gl.constexpr):
    index = work.first + gl.arange(0, 64, gl.SliceLayout(1, _scores_layout(form.KEYS)))
    seen, _full = steps(work.first, work.keys, 64, form)
    if not form.FRESH:
        mbarrier.wait(tiles.out_ready.index(W), done % 2)
    over = gl.max(((state.total >= form.LIMIT) & (index < work.last)).to(gl.int32), 0)
    if over > 0:
        state = _again(sources, tiles, work, seen * form.KEYS, factor, form, W)
    lse = _write(sources, results, tiles.out, state, old, work, form, W)
    gl.store(lse_pointers, lse / LOG2_E, mask=index < work.last)


@gluon.jit
def _skip_keys(position, tiles, form):
    mbarrier.wait(tiles.k_ready.index(position % form.STAGES), position // form.STAGES % 2)
    _leave(position % form.STAGES, form)


@gluon.jit
def _leave(number, form):
    arrive(FREE + number, MULTIPLIERS + FETCHERS)


@gluon.jit
def _first_weights(scores, tile, tiles, work, done, factor, form, W: gl.constexpr):
    """The weights of the last tile of keys, while the result of the tile of queries before leaves."""
    scores_layout: gl.constexpr = _scores_layout(form.KEYS)
    copies_read()
    group_barrier()
    if not form.FRESH:
        mbarrier.arrive(tiles.out_free.index(W), pred=done > 0)
    scores = _masked(scores * factor, tile * form.KEYS, work, form, scores_layout)
    maximum = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, scores_layout))
    weights, maximum, _shrink = _online(scores, maximum)
    out_layout: gl.constexpr = _scores_layout(form.D)
    return Softmax(weights, maximum, gl.sum(weights, 1), gl.zeros([64, form.D], gl.float32, out_layout))


@gluon.jit
def _step(position, tile, state, query, tiles, work, factor, form, W: gl.constexpr, MASKED: gl.constexpr):
    """The scores of a tile of keys beside the weighted sum of the tile before."""
    scores_layout: gl.constexpr = _scores_layout(form.KEYS)
    slot, before = position % form.STAGES, (position - 1) % form.STAGES
    operand = _operand(state.weights, tiles.q.dtype, form)
    mbarrier.wait(tiles.k_ready.index(slot), position // form.STAGES % 2)
    scores = _scores(query, tiles.k.index(slot), tiles, form, W)
    mbarrier.wait(tiles.v_ready.index(before), (position - 1) // form.STAGES % 2)
    result = warpgroup_mma(operand, tiles.v.index(before), state.result, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    _leave(slot, form)
    maximum, total = state.maximum, state.total
    if MASKED:
        scores = _masked(scores * factor, tile * form.KEYS, work, form, scores_layout)
        weights, maximum, shrink = _online(scores, maximum)
        total *= shrink
    else:
        weights = gl.exp2(scores * factor - maximum[:, None])
    total += gl.sum(weights, 1)
    result, operand = warpgroup_mma_wait(0, deps=[result, operand])
    _leave(form.STAGES + before, form)
    if MASKED:
        result *= _of_result(shrink, form)
    return Softmax(weights, maximum, total, result)


@gluon.jit
def _last_sum(position, done, state, tiles, form, W: gl.constexpr):
    slot = position % form.STAGES
    operand = _operand(state.weights, tiles.q.dtype, form)
    mbarrier.wait(tiles.v_ready.index(slot), position // form.STAGES % 2)
    result = warpgroup_mma(operand, tiles.v.index(slot), state.result, is_async=True)
    number, _phase = query_slot(done)
    group_barrier()
    mbarrier.arrive(tiles.q_free.index(number + W))
    return result, operand, slot


@gluon.jit
def _masked(scores, first_key, work, form, scores_layout: gl.constexpr):
    stop = gl.full([64], 0, gl.int32, gl.SliceLayout(1, scores_layout)) + work.keys
    if form.CAUSAL:
        stop = gl.minimum(stop, work.first + 1 + gl.arange(0, 64, gl.SliceLayout(1, scores_layout)))
    return keep_columns(scores, None, stop - first_key, -float("inf"))


@gluon.jit
def _online(scores, maximum):
    """``(weights, maximum, shrink)``: the maximum raised to that of the scores, and the factor of what was summed."""
    new = gl.maximum(maximum, gl.max(scores, 1))
    level = gl.where(new == -float("inf"), 0.0, new)
    return gl.exp2(scores - level[:, None]), new, gl.exp2(maximum - level)


@gluon.jit
def _operand(weights, DTYPE: gl.constexpr, form):
    """Weights as the matrix units read them from registers."""
    return gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, _scores_layout(form.D), 2))


@gluon.jit
def _of_result(x, form):
    """A number of each query, as a factor of the result."""
    return gl.convert_layout(x, gl.SliceLayout(1, _scores_layout(form.D)))[:, None]


@gluon.jit
def _again(sources, tiles, work, stop, factor, form, W: gl.constexpr):
    """The 64 queries once more, with the running maximum, all by way of their tile of the result.

    Takes an even number of phases of the group's own barrier, and leaves the running result in the tile.
    """
    scores_layout: gl.constexpr = _scores_layout(64)
    rows: gl.constexpr = gl.SliceLayout(1, _scores_layout(form.KEYS))
    out_layout: gl.constexpr = _scores_layout(form.D)
    places, bar, room = places_of(sources, work, form), tiles.own.index(W), tiles.out.index(W)
    # In the registers of a warp, not of each thread, of which the loop has none left.
    key_row, k_column, v_column = uniform(places.key_row), uniform(places.k_column), uniform(places.v_column)
    stop = uniform(stop)
    group_barrier()
    fetch_tile(sources.q, places.row, places.q_column, bar, tiles.out, W, 64, form.D)
    mbarrier.wait(bar, 0)
    query = room.load(gl.DotOperandLayout(0, scores_layout, 2))
    maximum = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, scores_layout))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, scores_layout))
    result = gl.zeros([64, form.D], gl.float32, out_layout)
    for start in range(0, stop, 64):
        fence_async_shared()
        group_barrier()
        fetch_tile(sources.k, key_row + start, k_column, bar, tiles.out, W, 64, form.D)
        mbarrier.wait(bar, 1)
        scores = _scores(query, room, tiles, form, W)
        scores = warpgroup_mma_wait(0, deps=[scores])
        group_barrier()
        fetch_tile(sources.v, key_row + start, v_column, bar, tiles.out, W, 64, form.D)
        scores = _masked(scores * factor, start, work, form, scores_layout)
        weights, maximum, shrink = _online(scores, maximum)
        total = total * shrink + gl.sum(weights, 1)
        result *= _of_result(shrink, form)
        mbarrier.wait(bar, 0)
        result = warpgroup_mma(_operand(weights, tiles.q.dtype, form), room, result, is_async=True)
        result = warpgroup_mma_wait(0, deps=[result])
    fence_async_shared()
    group_barrier()
    fetch_tile(sources.out, places.row, places.out_column, bar, tiles.out, W, 64, form.D)
    mbarrier.wait(bar, 1)
    weights = gl.zeros([64, form.KEYS], gl.float32, _scores_layout(form.KEYS))
    return Softmax(weights, gl.convert_layout(maximum, rows), gl.convert_layout(total, rows), result)


@gluon.jit
def _write(sources, results, room_tiles, state, old, work, form, W: gl.constexpr):
    """Write the result, with the earlier branches' share; returns the new lse in units of log 2."""
    out_layout: gl.constexpr = _scores_layout(form.D)
    DTYPE: gl.constexpr = room_tiles.dtype
    room = room_tiles.index(W)
    lse = state.maximum + gl.log2(state.total)
    if not form.FRESH:
        top = gl.maximum(lse, old)
        lse = top + gl.log2(gl.exp2(lse - top) + gl.exp2(old - top))
    result = state.result * _of_result(gl.exp2(state.maximum - lse), form)
    if not form.FRESH:
        result += room.load(out_layout).to(gl.float32) * _of_result(gl.exp2(old - lse), form)
    result = result.to(DTYPE)
    if work.first + 64 <= work.last:
        places = places_of(sources, work, form)
        room.store(result)
        fence_async_shared()
        group_barrier()
        parts = reinterpret(room, DTYPE, [form.D // 64, 64, 64], room.type.layout)
        for block in gl.static_range(form.D // 64):
            place = [places.row, places.out_column + block * 64]
            store_block(sources.out, place, parts.index(block))
    else:
        index = work.first + gl.arange(0, 64, gl.SliceLayout(1, out_layout))
        columns = gl.arange(0, form.D, gl.SliceLayout(0, out_layout))[None, :]
        strides = sources.out_strides
        pointers = results.out + work.batch.to(gl.int64) * strides[0] + work.head.to(gl.int64) * strides[2]
        pointers += ((work.origin + work.r * index.to(gl.int64)) * strides[1])[:, None]
        gl.store(pointers + columns, result, mask=(index < work.last)[:, None] & (columns < form.D))
    return lse
