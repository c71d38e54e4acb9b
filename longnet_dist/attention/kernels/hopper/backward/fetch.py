# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""What a program of the Hopper backward computes, and the warp that fetches it."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from longnet_dist.attention.kernels.hopper.gluon_api import fetch_block, fetch_elements, reinterpret
from longnet_dist.attention.kernels.hopper.instructions import meet
from longnet_dist.attention.kernels.triton.tiles import locate, numbered

FETCHERS = gl.constexpr(32)  # threads that fetch
MULTIPLIERS = gl.constexpr(256)  # threads that multiply
# Barriers of the hardware that Triton leaves alone. READY + g: dS that group g needs is written; FREE + g: dS that
# group g wrote is read; both at even steps and, two further, at odd ones. SLOT_FREE + s: the tiles of slot s are read.
READY, FREE, SLOT_FREE = gl.constexpr(4), gl.constexpr(8), gl.constexpr(12)


class Form(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
        HALVES: times 64 queries of a tile.
        STAGES: tiles of queries in shared memory.
        OVERLAPS: whether ``Problem.overlaps`` has any.
        ADDS_DQ: whether dQ is added too, in an order that changes from run to run.
    """

    D: Any
    HALVES: Any
    STAGES: Any
    CAUSAL: Any
    COMPACT: Any
    GROUPED: Any
    FRESH: Any
    OVERLAPS: Any
    ADDS_DQ: Any


class Tiles(NamedTuple):
    """Shared memory; ``n`` is stages times halves.

    Attributes:
        key, value: ``(2, 64, D)``; q, dout: ``(n, 64, D)``; lse, delta: ``(n, 64)``.
        early_ds, late_ds: dS of the keys of each group, ``(2, 64, 64)``, of the first and the second 64 queries; where
            a tile has no second, one buffer of twice the size, for even and odd steps.
        dq: what each group adds to dQ, ``(2, 64, 64)``.
        key_columns, query_columns: ``multiplicity_columns`` of each group's keys and of 64 queries, ``(2, 64, 16)``.
        key_ready, ready: barriers of the keys and values, and of each stage.
    """

    key: Any
    value: Any
    q: Any
    dout: Any
    lse: Any
    delta: Any
    early_ds: Any
    late_ds: Any
    dq: Any
    key_columns: Any
    query_columns: Any
    key_ready: Any
    ready: Any


class Sources(NamedTuple):
    """What is read: descriptors, a pointer to the statistics, all their strides, and rows a sequence has."""

    q: Any
    k: Any
    v: Any
    dout: Any
    statistics: Any
    q_strides: Any
    k_strides: Any
    v_strides: Any
    dout_strides: Any
    statistics_strides: Any
    rows: Any
    key_rows: Any


class Work(NamedTuple):
    """The key tile of a program, and the queries that see it.

    Attributes:
        origin: buffer row of index 0; ``begin``: index of the segment's first key.
        first_key, keys: first key of the tile and number of keys, counted from ``begin``.
        first, count: first index and number of queries; ``num_tiles`` tiles of them for each of ``group`` heads.
        num_diagonal, tail: tiles at the mask's edge, and 1 if the last tile is short; ``masked``: both.
    """

    batch: Any
    kv_head: Any
    group: Any
    origin: Any
    begin: Any
    first_key: Any
    keys: Any
    first: Any
    count: Any
    num_tiles: Any
    num_diagonal: Any
    tail: Any
    masked: Any
    seen_from: Any


@gluon.jit
def work_of_program(shape, group, form, zero=None):
    """``shape``: what ``numbers`` of a launch gives, but ``group``, then the table and the heads before.

    With a table the tiles are those of all segments, and what is named so there is a tile. With ``zero``, which is 0
    but not for the compiler, nothing is taken from an earlier call.
    """
    table = shape[13]
    tiles, segments, kv_heads, head_block, w, r = shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]
    program = gl.program_id(0)
    if zero is not None:
        program += zero
    first_key = program % tiles * 128
    segment = shape[6] + (program // tiles) % segments
    batch_head = program // tiles // segments
    if table is not None:
        segment = program % tiles
        first_key = gl.load(table + 3 * tiles + segment).to(gl.int32) * 128
        batch_head = program // tiles
    batch, kv_head = batch_head // kv_heads, batch_head % kv_heads
    name = numbered(kv_head, shape[14])
    origin, first, last, begin, keys = locate(
        segment, name, head_block, w, r, shape[7], shape[8], shape[9], shape[10], shape[11], table
    )
    QUERIES: gl.constexpr = 64 * form.HALVES
    if form.CAUSAL:
        first = gl.maximum(first, first_key)
    count = gl.where(first_key < keys, gl.maximum(last - first, 0), 0)
    num_tiles = gl.cdiv(count, QUERIES)
    num_diagonal = num_tiles * 0
    if form.CAUSAL:
        num_diagonal = gl.minimum(gl.cdiv(gl.maximum(first_key + 127 - first, 0), QUERIES), num_tiles)
    num_diagonal = gl.where(first_key + 128 > keys, num_tiles, num_diagonal)
    tail = ((count % QUERIES != 0) & (num_diagonal < num_tiles)).to(gl.int32)
    return Work(
        batch,
        kv_head,
        group,
        origin,
        begin,
        first_key,
        keys,
        first,
        count,
        num_tiles,
        num_diagonal,
        tail,
        num_diagonal + tail,
        0,
    )


@gluon.jit
def query_tile(step, work, form):
    """``(head of the group, first query)`` of a step: tiles on the diagonal and the short last one come first."""
    early = step < work.group * work.masked
    turn = gl.where(early, step, step - work.group * work.masked)
    member = turn * 0
    tiles = gl.where(early, work.masked, work.num_tiles - work.masked)
    if form.GROUPED:
        member = turn // tiles
    x = turn - member * tiles
    last = (work.tail > 0) & (x == work.num_diagonal)
    tile = gl.where(early, gl.where(last, work.num_tiles - 1, x), x + work.num_diagonal)
    return member, tile * (64 * form.HALVES)


@gluon.jit
def fetch(sources, tiles, shape, group, form):
    """The keys and values, then query tile after query tile of every head of the group."""
    work = work_of_program(shape, group, form)
    r = shape[5]
    first_row = work.origin + r * work.first
    query_row = work.batch.to(gl.int64) * sources.rows + first_row
    row, column = (query_row // r).to(gl.int32), (query_row % r).to(gl.int32)
    _fetch_keys(sources, tiles, work, r, form)
    head = work.kv_head * group
    q_column = column * sources.q_strides[1] + head * sources.q_strides[2]
    dout_column = column * sources.dout_strides[1] + head * sources.dout_strides[2]
    strides = sources.statistics_strides
    statistics = sources.statistics + work.batch.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[2]
    statistics += first_row * strides[1]
    for step in range(group * work.num_tiles):
        slot = step % form.STAGES
        if step >= form.STAGES:
            meet(SLOT_FREE + slot, MULTIPLIERS + FETCHERS)
        member, start = query_tile(step, work, form)
        here = statistics + member * strides[2]
        _fetch_statistics(here, start, work.count, r * strides[1], tiles, slot, form)
        bar = tiles.ready.index(slot)
        mbarrier.expect(bar, (sources.q.block_type.nbytes + sources.dout.block_type.nbytes) * form.HALVES)
        for half in gl.static_range(form.HALVES):
            place, tile = row + start + half * 64, slot * form.HALVES + half
            from_q = [place, q_column + member * sources.q_strides[2]]
            from_dout = [place, dout_column + member * sources.dout_strides[2]]
            fetch_block(sources.q, from_q, bar, tiles.q.index(tile))
            fetch_block(sources.dout, from_dout, bar, tiles.dout.index(tile))
    # The groups leave a slot even after the last tile: whoever arrives at a barrier must be met.
    steps = group * work.num_tiles
    for step in range(gl.maximum(steps - form.STAGES, 0), steps):
        meet(SLOT_FREE + step % form.STAGES, MULTIPLIERS + FETCHERS)


@gluon.jit
def _fetch_keys(sources, tiles, work, r, form):
    first = work.begin + work.first_key
    row, jump = work.batch.to(gl.int64) * sources.key_rows + first, 1
    if not form.COMPACT:
        row, jump = row + work.origin + (r - 1) * first, r
    place, column = (row // jump).to(gl.int32), (row % jump).to(gl.int32)
    k_column = column * sources.k_strides[1] + work.kv_head * sources.k_strides[2]
    v_column = column * sources.v_strides[1] + work.kv_head * sources.v_strides[2]
    mbarrier.expect(tiles.key_ready, 2 * (sources.k.block_type.nbytes + sources.v.block_type.nbytes))
    for w in gl.static_range(2):
        fetch_block(sources.k, [place + 64 * w, k_column], tiles.key_ready, tiles.key.index(w))
    for w in gl.static_range(2):
        fetch_block(sources.v, [place + 64 * w, v_column], tiles.key_ready, tiles.value.index(w))


@gluon.jit
def _fetch_statistics(statistics, start, count, row_stride, tiles, slot, form):
    """LSE and delta of the queries from ``start`` on; not by the copy engine, for they need not be aligned."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    vector: gl.constexpr = tiles.lse.type.layout
    QUERIES: gl.constexpr = 64 * form.HALVES
    lse = reinterpret(tiles.lse, gl.float32, [form.STAGES, QUERIES], vector)
    delta = reinterpret(tiles.delta, gl.float32, [form.STAGES, QUERIES], vector)
    index = start + gl.arange(0, QUERIES, layout)
    pointers = statistics + index.to(gl.int64) * row_stride
    fetch_elements(lse.index(slot), pointers, index < count)
    fetch_elements(delta.index(slot), pointers + 1, index < count)
    async_copy.mbarrier_arrive(tiles.ready.index(slot), increment_count=False)
