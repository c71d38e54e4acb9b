"""Launch of the backward kernel written for Hopper, and which calls it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longnet_dist.kernels.contract import Call
from longnet_dist.kernels.hopper_backward import hopper_backward_kernel


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


def takes_backward(call: Call, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> bool:
    """Whether the kernel computes this call: Hopper, D 64 or 128, half precision, buffers that are plain matrices.

    Args:
        queries: the buffers of query rows that it reads or adds to; ``keys``: those of keys that it reads.
    """
    key, rate = keys[0], call.piece.dilation_rate
    return (
        key.is_cuda
        and torch.cuda.get_device_capability(key.device)[0] == 9
        and not call.deterministic
        and key.shape[3] in TILES
        and key.dtype in (torch.bfloat16, torch.float16)
        and all(_flat(x, rate) for x in queries)
        and all(_flat(x, 1 if call.piece.compact else rate) for x in keys)
    )


def backward(
    call: Call,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    programs: int,
    arguments: tuple[Any, ...],
) -> None:
    """One launch for dQ, dK and dV of a piece."""
    rate = call.piece.dilation_rate
    key_rate = 1 if call.piece.compact else rate
    tiles = TILES[q.shape[3]]
    hopper_backward_kernel[(programs,)](
        _matrix(dout, rate, 64),
        _matrix(q, rate, 64),
        _matrix(k, key_rate, tiles.keys),
        _matrix(v, key_rate, tiles.keys),
        statistics,
        _matrix(dq, rate, tiles.queries),
        dk,
        dv,
        *(x.stride()[:3] for x in (dout, q, k, v, statistics, dq, dk, dv)),
        q.shape[1],
        k.shape[1],
        *arguments,
        D=q.shape[3],
        QUERIES=tiles.queries,
        KEYS=tiles.keys,
        CAUSAL=call.causal,
        COMPACT=call.piece.compact,
        GROUPED=q.shape[2] > k.shape[2],
        FRESH=call.fresh,
        STAGES=tiles.stages,
        KEY_REGISTERS=tiles.key_registers,
        num_warps=tiles.warps,
    )


def _flat(x: Tensor, rate: int) -> bool:
    """Whether ``x`` ``(B, rows, H, D)`` is a matrix ``(B·rows / r, r·row_stride)`` for the copy engine."""
    batch, rows, _, dim = x.shape
    return (
        x.stride(2) == dim
        and rows >= rate
        and (batch == 1 or (x.stride(0) == rows * x.stride(1) and rows % rate == 0))
        and x.stride(1) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        and rate * x.stride(1) < 2**31
    )


def _matrix(x: Tensor, rate: int, rows: int) -> TensorDescriptor:
    batch, length, heads, dim = x.shape
    width = (rate - 1) * x.stride(1) + heads * dim
    layout = gl.NVMMASharedLayout(128, x.element_size() * 8, 2)
    return TensorDescriptor(x, [batch * length // rate, width], [rate * x.stride(1), 1], [rows, dim], layout)
