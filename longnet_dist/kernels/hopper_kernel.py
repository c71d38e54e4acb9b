"""Launch of the backward kernel written for Hopper, and which calls it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longnet_dist.kernels.contract import Call
from longnet_dist.kernels.hopper_backward import hopper_backward_kernel

_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
# Head dim: rows of a tile of queries and of keys, warps that compute, stages, registers a thread (None: all there are).
# At D 64 two programs share a multiprocessor; at D 128 there is shared memory for one.
TILES: dict[int, tuple[int, int, int, int, int | None]] = {64: (64, 64, 4, 3, 128), 128: (64, 128, 8, 2, None)}


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
    queries, keys, warps, stages, registers = TILES[q.shape[3]]
    hopper_backward_kernel[(programs,)](
        _matrix(dout, rate, queries),
        _matrix(q, rate, queries),
        _matrix(k, key_rate, keys),
        _matrix(v, key_rate, keys),
        statistics,
        _matrix(dq, rate, queries),
        dk,
        dv,
        *(x.stride()[:3] for x in (dout, q, k, v, statistics, dq, dk, dv)),
        q.shape[1],
        k.shape[1],
        *arguments,
        D=q.shape[3],
        QUERIES=queries,
        KEYS=keys,
        CAUSAL=call.causal,
        COMPACT=call.piece.compact,
        FRESH=call.fresh,
        STAGES=stages,
        num_warps=warps,
        maxnreg=registers,
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
    layout = gl.NVMMASharedLayout.get_default_for([rows, dim], _TYPES[x.dtype])
    return TensorDescriptor(x, [batch * length // rate, width], [rate * x.stride(1), 1], [rows, dim], layout)
