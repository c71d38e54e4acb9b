# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""What a program of the Hopper forward computes, and the warp that fetches it."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from longnet_dist.attention.kernels.hopper.backward.fetch import FETCHERS, MULTIPLIERS
from longnet_dist.attention.kernels.hopper.gluon_api import fetch_block, reinterpret
from longnet_dist.attention.kernels.hopper.instructions import meet
from longnet_dist.attention.kernels.triton.tiles import locate, numbered

FREE = gl.constexpr(8)  # barriers of the hardware: the keys of slot s are read; STAGES further, its values


class Form(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
        KEYS: of a tile; STAGES: tiles of keys, and of values, in shared memory, at most 4.
        TURNS: tiles of 128 queries that a program takes one after the other.
        LIMIT: the largest sum that a kept maximum may leave.
        OVERLAPS: whether ``Problem.overlaps`` has any.
    """

    D: Any
    KEYS: Any
    STAGES: Any
    TURNS: Any
    CAUSAL: Any
    COMPACT: Any
    FRESH: Any
    LIMIT: Any
    OVERLAPS: Any


class Sources(NamedTuple):
    """What the copy engine reads: descriptors in blocks ``(64, 64)``, strides, and rows a sequence has."""

    q: Any
    k: Any
    v: Any
    out: Any
    q_strides: Any
    k_strides: Any
    v_strides: Any
    out_strides: Any
    rows: Any
    key_rows: Any


class Tiles(NamedTuple):
    """Shared memory.

    Attributes:
        q: of two tiles of queries in turn, each group's, ``(4, 64, D)``.
        out: the running result of each group, then its new one, ``(2, 64, D)``.
        k, v: ``(STAGES, KEYS, D)``.
        q_ready, q_free, out_ready, out_free: barriers of their tiles; own: of what each group fetches itself.
        k_ready, v_ready: of each stage.
        query_columns, key_columns: ``multiplicity_columns`` of each group's queries and of 64 keys, ``(2, 64, 16)``.
    """

    q: Any
    k: Any
    v: Any
    out: Any
    q_ready: Any
    q_free: Any
    out_ready: Any
    out_free: Any
    own: Any
    k_ready: Any
    v_ready: Any
    query_columns: Any
    key_columns: Any


class Work(NamedTuple):
    """A tile of queries.

    Attributes:
        origin: buffer row of index 0; the next index is ``r`` rows further.
        begin: index of the segment's first key.
        first: index of the first query; ``last``: end of the queries of the segment; ``keys``: 0 if there is no tile.
    """

    batch: Any
    head: Any
    kv_head: Any
    origin: Any
    r: Any
    begin: Any
    first: Any
    last: Any
    keys: Any


class Places(NamedTuple):
    """Where queries and key 0 stand in the views ``(B·rows / r, r·row_stride)``."""

    row: Any
    q_column: Any
    out_column: Any
    key_row: Any
    k_column: Any
    v_column: Any


@gluon.jit
def work_of_turn(turn, shape, form):
    """The ``turn``-th tile of the program; ``shape``: what ``numbers`` of a launch gives, the table, the heads before.

    The longest first; a program with several takes the last with the first, the last but one with the second. With a
    table it takes one, the tiles are those of all segments, and what is named so there is a tile.
    """
    table = shape[14]
    tiles, segments, heads, group, head_block, w, r = shape[:7]
    places = gl.cdiv(tiles, form.TURNS)
    program = gl.program_id(0)
    number = program % places * form.TURNS + turn
    tile = tiles - 1 - number
    if form.TURNS > 1:
        tile = gl.where(number % 2 == 0, tiles - 1 - number // 2, number // 2)
    segment = shape[7] + (program // places) % segments
    batch_head = program // places // segments
    if table is not None:
        segment = gl.minimum(number, tiles - 1)
        tile = gl.load(table + 3 * tiles + segment).to(gl.int32)
        batch_head = program // tiles
    batch, head = batch_head // heads, batch_head % heads
    name = numbered(head // group, shape[15])
    origin, first, last, begin, keys = locate(
        segment, name, head_block, w, r, shape[8], shape[9], shape[10], shape[11], shape[12], table
    )
    first += tile * 128
    return Work(
        batch, head, head // group, origin, r, begin, first, last, gl.where((number < tiles) & (first < last), keys, 0)
    )


@gluon.jit
def steps(first, keys, QUERIES: gl.constexpr, form):
    """``(seen, full)``: tiles of keys that the queries from ``first`` on see, and how many of them without a mask.

    The last one always counts as masked: it gives the maximum.
    """
    stop, full = keys, keys // form.KEYS
    if form.CAUSAL:
        stop = gl.minimum(keys, first + QUERIES)
        full = gl.minimum(keys, first) // form.KEYS
    seen = gl.cdiv(stop, form.KEYS)
    return seen, gl.minimum(full, seen - 1)


@gluon.jit
def places_of(sources, work, form):
    """Where the queries from ``work.first`` on and their keys stand."""
    row = work.batch.to(gl.int64) * sources.rows + work.origin + work.r * work.first
    column, tile_row = (row % work.r).to(gl.int32), (row // work.r).to(gl.int32)
    key_row, jump = work.batch.to(gl.int64) * sources.key_rows + work.begin, 1
    if not form.COMPACT:
        key_row, jump = key_row + work.origin + (work.r - 1) * work.begin, work.r
    key_column, key_row = (key_row % jump).to(gl.int32), (key_row // jump).to(gl.int32)
    return Places(
        tile_row,
        column * sources.q_strides[1] + work.head * sources.q_strides[2],
        column * sources.out_strides[1] + work.head * sources.out_strides[2],
        key_row,
        key_column * sources.k_strides[1] + work.kv_head * sources.k_strides[2],
        key_column * sources.v_strides[1] + work.kv_head * sources.v_strides[2],
    )


@gluon.jit
def query_slot(done):
    """``(number, phase)`` of the first group's queries, after ``done`` tiles."""
    return done % 2 * 2, done // 2 % 2


@gluon.jit
def fetch_tile(source, row, column, bar, tiles, number, ROWS: gl.constexpr, D: gl.constexpr):
    """Tile ``number`` of ``tiles (n, ROWS, D)``, in blocks ``(64, 64)``: shared memory holds 64 columns together."""
    PARTS: gl.constexpr = ROWS // 64 * (D // 64)
    DTYPE: gl.constexpr = tiles.dtype
    COUNT: gl.constexpr = tiles.type.shape[0] * PARTS
    parts = reinterpret(tiles, DTYPE, [COUNT, 64, 64], tiles.type.layout)
    mbarrier.expect(bar, ROWS * D * 2)
    for block in gl.static_range(D // 64):
        for part in gl.static_range(ROWS // 64):
            target = parts.index(number * PARTS + block * (ROWS // 64) + part)
            fetch_block(source, [row + part * 64, column + block * 64], bar, target)


@gluon.jit
def fetch(sources, tiles, shape, form):
    """Queries, keys and values from the last tile to the first, and the running result."""
    base, done = 0, 0
    for turn in range(form.TURNS):
        work = work_of_turn(turn, shape, form)
        if work.keys > 0:
            places = places_of(sources, work, form)
            seen, _full = steps(work.first, work.keys, 128, form)
            for step in range(seen + 1):
                if step < seen:
                    place = places.key_row + (seen - 1 - step) * form.KEYS
                    _fetch_slot(base + step, 0, sources.k, place, places.k_column, tiles.k, tiles.k_ready, form)
                if step == 0:
                    number, phase = query_slot(done)
                    bars = (tiles.q_ready, tiles.q_free)
                    _fetch_groups(number, phase, sources.q, places.row, places.q_column, tiles.q, bars, form)
                else:
                    place = places.key_row + (seen - step) * form.KEYS
                    _fetch_slot(base + step - 1, 1, sources.v, place, places.v_column, tiles.v, tiles.v_ready, form)
            if not form.FRESH:
                bars = (tiles.out_ready, tiles.out_free)
                _fetch_groups(0, done % 2, sources.out, places.row, places.out_column, tiles.out, bars, form)
            base, done = base + seen, done + 1
    # The groups leave a slot even after the last tile: whoever arrives at a barrier must be met.
    for step in range(gl.maximum(base - form.STAGES, 0), base):
        meet(FREE + step % form.STAGES, MULTIPLIERS + FETCHERS)
        meet(FREE + form.STAGES + step % form.STAGES, MULTIPLIERS + FETCHERS)


@gluon.jit
def _fetch_slot(position, WHICH: gl.constexpr, source, row, column, tiles, ready, form):
    slot = position % form.STAGES
    if position >= form.STAGES:
        meet(FREE + WHICH * form.STAGES + slot, MULTIPLIERS + FETCHERS)
    fetch_tile(source, row, column, ready.index(slot), tiles, slot, form.KEYS, form.D)


@gluon.jit
def _fetch_groups(number, phase, source, row, column, tiles, bars, form):
    ready, free = bars
    for w in gl.static_range(2):
        mbarrier.wait(free.index(number + w), phase ^ 1)
        fetch_tile(source, row + 64 * w, column, ready.index(number + w), tiles, number + w, 64, form.D)
