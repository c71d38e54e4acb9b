"""Launch of the backward kernel written for Hopper, and which calls it takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longnet_dist.kernels.hopper_backward import hopper_backward_kernel
from longnet_dist.kernels.triton_launch import Geometry, Launch, Problem, View


@dataclass(frozen=True, slots=True)
class HopperTiles:
    """Rows of a tile of queries and of keys, warps that compute, stages, and whether K is read from registers."""

    queries: int
    keys: int
    warps: int
    stages: int
    key_registers: bool


# By head dim: the fastest of benchmarks/results/attention_kernels.md.
TILES = {64: HopperTiles(128, 128, 8, 3, True), 128: HopperTiles(64, 128, 8, 2, False)}


def takes_backward(problem: Problem, queries: tuple[Geometry, ...], keys: tuple[Geometry, ...]) -> bool:
    """Whether the kernel computes this: Hopper, D 64 or 128, half precision, buffers that are plain matrices.

    Args:
        queries: the buffers of query rows that it reads or adds to; ``keys``: those of keys that it reads.
    """
    return (
        problem.fits
        and torch.cuda.get_device_capability(problem.q.device)[0] == 9
        and not problem.call.deterministic
        and problem.dim in TILES
        and not problem.wide
        and all(_flat(x, problem.piece.dilation_rate) for x in queries)
        and all(_flat(x, problem.key_rate) for x in keys)
    )


def backward_launch(problem: Problem, buffers: tuple[Geometry, ...]) -> Launch:
    """One launch for dQ, dK and dV of a piece, on ``dout, q, k, v, statistics, dq, dk, dv``."""
    dout, q, k, v, _, dq, _, _ = buffers
    tiles, heads = TILES[problem.dim], k.shape[2]
    rate, key_rate = problem.piece.dilation_rate, problem.key_rate
    views = (
        _matrix(dout, rate, 64),
        _matrix(q, rate, 64),
        _matrix(k, key_rate, tiles.keys),
        _matrix(v, key_rate, tiles.keys),
        None,
        _matrix(dq, rate, tiles.queries),
        None,
        None,
    )
    constants = {
        "D": problem.dim,
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "CAUSAL": problem.call.causal,
        "COMPACT": problem.piece.compact,
        "GROUPED": q.shape[2] > heads,
        "FRESH": problem.call.fresh,
        "STAGES": tiles.stages,
        "KEY_REGISTERS": tiles.key_registers,
    }
    return Launch(
        hopper_backward_kernel,
        problem.programs(problem.keys, tiles.keys, heads),
        views,
        (q.shape[1], k.shape[1], *problem.numbers(problem.keys, tiles.keys, heads, *buffers)),
        constants,
        {"num_warps": tiles.warps},
    )


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


def _matrix(x: Geometry, rate: int, rows: int) -> View:
    """Tiles of ``rows`` rows of a head, ``rate`` rows apart."""
    batch, length, heads, dim = x.shape
    width = (rate - 1) * x.stride[1] + heads * dim
    layout = gl.NVMMASharedLayout(128, x.dtype.itemsize * 8, 2)
    return View(TensorDescriptor, ([batch * length // rate, width], [rate * x.stride[1], 1], [rows, dim], layout))
