"""Launches of the kernels written for Hopper, and which calls they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longnet_dist.attention.kernels.hopper import support
from longnet_dist.attention.kernels.hopper.backward.kernel import hopper_backward_kernel
from longnet_dist.attention.kernels.hopper.forward.kernel import hopper_forward_kernel
from longnet_dist.attention.kernels.hopper.tables import TileTable, listed_tiles, tile_table
from longnet_dist.attention.kernels.triton.launch import BACKWARD_SIDES, FORWARD_SIDES, Geometry, Launch, Problem, View


@dataclass(frozen=True, slots=True)
class HopperTiles:
    """Rows of a tile of queries, and how many such tiles there is room for."""

    queries: int
    stages: int


@dataclass(frozen=True, slots=True)
class ForwardTiles:
    """Of the forward kernel: keys of a tile, how many such tiles there is room for, tiles of queries of a program."""

    keys: int
    stages: int
    turns: int


# By head dim: the fastest of benchmarks/results/attention_kernels.md.
FORWARD_TILES = {128: ForwardTiles(keys=64, stages=4, turns=4)}
TILES = {64: HopperTiles(128, 3), 128: HopperTiles(64, 2)}
OPTIONS: dict[str, Any] = {"num_warps": 4}
QUERIES = KEYS = 128  # of a tile of a program, forward and backward
ENOUGH = 4 * 132  # programs: with fewer, some multiprocessors have more to do than others


def prepare(problem: Problem) -> None:
    """List the tiles that the launches of a piece with a table of segments take."""
    if not _takes_piece(problem):
        return
    piece, fresh = problem.piece, problem.call.fresh
    if problem.dim in support.FORWARD_DIMS:
        listed_tiles(piece, True, QUERIES, fresh)
    if problem.dim in support.BACKWARD_DIMS:
        listed_tiles(piece, False, KEYS, fresh)


def takes_forward(problem: Problem, buffers: tuple[Geometry, ...]) -> bool:
    """Whether the forward kernel computes this: Hopper, its head dims, half precision, plain matrices."""
    q, k, v, out, _ = buffers
    return problem.dim in support.FORWARD_DIMS and _takes(problem, (q, out), (k, v))


def forward_launch(problem: Problem, buffers: tuple[Geometry, ...]) -> Launch:
    """One launch for a piece, on ``q, k, v``, ``out`` for the copy engine, ``out, lse``."""
    q, k, v, out, _ = buffers
    tiles, heads = FORWARD_TILES[problem.dim], q.shape[2]
    table = _table(problem, True, QUERIES)
    many = table is None and problem.programs(problem.queries, QUERIES * tiles.turns, heads) >= ENOUGH
    turns = tiles.turns if many else 1
    rate, key_rate = problem.piece.dilation_rate, problem.key_rate
    views = (*(_matrix(x, y, 64, 64) for x, y in ((q, rate), (k, key_rate), (v, key_rate), (out, rate))), None, None)
    constants = {
        "D": problem.dim,
        "KEYS": tiles.keys,
        "CAUSAL": problem.causal,
        "OVERLAPS": problem.overlaps > 0,
        "COMPACT": problem.piece.compact,
        "FRESH": problem.call.fresh,
        "STAGES": tiles.stages - bool(problem.overlaps),  # whose columns need the room
        "TURNS": turns,
        "LIMIT": problem.limit,
    }
    strides = (x.stride[:3] for x in buffers)
    programs, numbers = _work(problem, table, problem.queries, QUERIES, turns, heads)
    return Launch(
        hopper_forward_kernel,
        programs,
        views,
        (*strides, q.shape[1], k.shape[1], *numbers),
        constants,
        OPTIONS,
        problem.first_rows(FORWARD_SIDES),
    )


def takes_backward(problem: Problem, buffers: tuple[Geometry, ...]) -> bool:
    """Whether the kernel computes this: Hopper, D 64 or 128, half precision, buffers that are plain matrices."""
    dout, q, k, v, _, dq, _, _ = buffers
    return problem.dim in support.BACKWARD_DIMS and _takes(problem, (dout, q, dq), (k, v))


def backward_launch(problem: Problem, buffers: tuple[Geometry, ...]) -> Launch:
    """One launch for dK, dV and, unless deterministic, dQ of a piece: ``dout, q, k, v, statistics, dq, dk, dv``."""
    dout, q, k, v, _, dq, _, _ = buffers
    tiles, heads = TILES[problem.dim], k.shape[2]
    rate, key_rate = problem.piece.dilation_rate, problem.key_rate
    views = (
        _matrix(dout, rate, 64),
        _matrix(q, rate, 64),
        _matrix(k, key_rate, 64),
        _matrix(v, key_rate, 64),
        None,
        _matrix(dq, rate, 64, 64),
        None,
        None,
    )
    constants = {
        "D": problem.dim,
        "QUERIES": tiles.queries,
        "STAGES": tiles.stages,
        "CAUSAL": problem.causal,
        "OVERLAPS": problem.overlaps > 0,
        "COMPACT": problem.piece.compact,
        "GROUPED": q.shape[2] > heads,
        "FRESH": problem.call.fresh,
        "ADDS_DQ": not problem.call.deterministic,
    }
    programs, numbers = _work(problem, _table(problem, False, KEYS), problem.keys, KEYS, 1, heads)
    return Launch(
        hopper_backward_kernel,
        programs,
        views,
        (q.shape[1], k.shape[1], *(x.stride[:3] for x in buffers), *numbers),
        constants,
        OPTIONS,
        problem.first_rows(BACKWARD_SIDES),
    )


def _table(problem: Problem, of_queries: bool, rows: int) -> TileTable | None:
    if problem.piece.table is None:
        return None
    return tile_table(problem.piece, of_queries, rows, problem.call.fresh, problem.q.device)


def _work(
    problem: Problem, table: TileTable | None, rows: int, tile: int, turns: int, heads: int
) -> tuple[int, tuple[Any, ...]]:
    """Programs of a launch, and the integers of all kernels with the scale, the table and the heads before."""
    before = problem.heads_before
    if table is None:
        return problem.programs(rows, tile * turns, heads), (*problem.numbers(rows, tile, heads), None, before)
    programs = table.tiles * problem.q.shape[0] * heads
    return programs, (*problem.numbers(table.tiles, 1, heads), table.integers, before)


def _takes(problem: Problem, queries: tuple[Geometry, ...], keys: tuple[Geometry, ...]) -> bool:
    return (
        _takes_piece(problem)
        and all(_flat(x, problem.piece.dilation_rate) for x in queries)
        and all(_flat(x, problem.key_rate) for x in keys)
    )


def _takes_piece(problem: Problem) -> bool:
    return (
        problem.fits
        and (problem.piece.table is None or takes_tables(problem.call.deterministic))
        and problem.call.head_block is not None
        and (problem.heads_before is None or support.TABLES)
        and torch.cuda.get_device_capability(problem.q.device)[0] == support.COMPUTE_CAPABILITY
        and not problem.wide
    )


def takes_tables(deterministic: bool) -> bool:
    """Whether documents and shifted grids run on the kernels for Hopper.

    Not where a document must be bitwise what it is alone: whether the copy engine can see its last rows depends on the
    rows behind it, and other rows go to other kernels.
    """
    return support.TABLES and not deterministic


def _flat(x: Geometry, rate: int) -> bool:
    """Whether ``x`` ``(B, rows, H, D)`` is a matrix ``(B·rows / r, r·row_stride)`` for the copy engine."""
    batch, rows, _, dim = x.shape
    return (
        x.stride[2] == dim
        and rows >= rate
        and (batch == 1 or (x.stride[0] == rows * x.stride[1] and rows % rate == 0))
        and x.stride[1] * x.dtype.itemsize % 16 == 0
        and x.aligned
        and rate * x.stride[1] < 2**31
    )


def _matrix(x: Geometry, rate: int, rows: int, columns: int | None = None) -> View:
    """Tiles of ``rows`` rows of a head, ``rate`` rows apart; of ``columns`` columns, if not all of the head's."""
    batch, length, heads, dim = x.shape
    width = (rate - 1) * x.stride[1] + heads * dim
    block, layout = [rows, columns or dim], gl.NVMMASharedLayout(128, x.dtype.itemsize * 8, 2)
    return View(TensorDescriptor, ([batch * length // rate, width], [rate * x.stride[1], 1], block, layout))
