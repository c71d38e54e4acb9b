"""The Triton backend: one launch a piece forward, one or two backward, in place on strided rows."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from longnet_dist.geometry.window import Piece
from longnet_dist.kernels.contract import Call, wide_dtype
from longnet_dist.kernels.triton_backward import key_gradient_kernel, query_gradient_kernel, statistics_kernel
from longnet_dist.kernels.triton_forward import forward_kernel

_log = logging.getLogger(__name__)
HOPPER_TRITON = "3.6."


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows of a tile of queries and of keys, and how the compiler shall lay them out."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        return {
            "QUERIES": self.queries,
            "KEYS": self.keys,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": self.registers,
        }


def forward_tiles(dim: int, wide: bool, causal: bool) -> Tiles:
    """Tiles of the forward kernel, the fastest of benchmarks/results/attention_kernels.md; ``wide``: float32."""
    if wide:
        return Tiles(32, 32, 4, 2)
    if dim <= 64:  # 128 registers: four programs a multiprocessor
        return Tiles(64, 64, 4, 3, 128) if causal else Tiles(128, 64, 4, 3)
    return Tiles(64, 64, 4, 3) if dim <= 128 else Tiles(64, 32, 4, 2)


def key_gradient_tiles(dim: int, wide: bool) -> Tiles:
    """Tiles of the kernel for dK and dV."""
    if wide:
        return Tiles(32, 32, 4, 1)
    if dim <= 64:
        return Tiles(64, 64, 4, 2)
    return Tiles(64, 128, 8, 2) if dim <= 128 else Tiles(32, 64, 8, 1)


def query_gradient_tiles(dim: int, wide: bool) -> Tiles:
    """Tiles of the kernel for dQ alone."""
    if wide:
        return Tiles(32, 32, 4, 1)
    return Tiles(64, 64, 4, 2) if dim <= 128 else Tiles(64, 32, 8, 1)


class TritonKernel:
    """Kernels of our own: no merge pass, no output of a single branch, dQ in one float32 buffer, dK and dV in place."""

    name = "triton"
    starts_fresh = True

    def accumulator_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def gradient_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        return wide_dtype(dtype), dtype

    def forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        for part in _parts(call, q.shape[1]):
            self._forward(part, q, k, v, out, lse)

    def _forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        launch = _Launch(call, q, k)
        tiles = forward_tiles(launch.block_dim, q.element_size() > 2, call.causal)
        described = launch.describable((q, out), (k, v))
        forward_kernel[launch.grid(launch.queries, tiles.queries, q.shape[2])](
            launch.query_source(q, tiles.queries, described),
            launch.key_source(k, tiles.keys, described),
            launch.key_source(v, tiles.keys, described),
            launch.query_source(out, tiles.queries, described),
            out,
            lse,
            *(x.stride()[:3] for x in (q, k, v, out, lse)),
            *launch.arguments(launch.queries, tiles.queries, q.shape[2]),
            **launch.constants(described),
            FRESH=call.fresh,
            LIMIT=2.0**15 if q.dtype == torch.float16 else 2.0**100,
            **tiles.options,
        )

    def start_backward(self, dout: Tensor, out: Tensor, lse: Tensor, dq: Tensor, room: Tensor | None = None) -> Tensor:
        batch, rows, heads, dim = out.shape
        needed = batch * heads * rows * 2 * lse.element_size()
        if room is not None and room.nbytes >= needed:
            space = room.flatten()[: needed // room.element_size()].view(lse.dtype)
        else:
            space = lse.new_empty(batch * heads * rows * 2)
        statistics = space.view(batch, heads, rows, 2).transpose(1, 2)
        statistics_kernel[(batch * heads * triton.cdiv(rows, 64),)](
            dout,
            out,
            lse,
            statistics,
            dq,
            *(x.stride()[:3] for x in (dout, out, lse, statistics, dq)),
            rows,
            heads,
            D=dim,
            BLOCK_D=_block_dim(dim),
            ROWS=64,
        )
        return statistics

    def backward(
        self,
        call: Call,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        statistics: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        for part in _parts(call, q.shape[1]):
            self._backward(part, dout, q, k, v, statistics, dq, dk, dv)

    def _backward(
        self,
        call: Call,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        statistics: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        lse, delta = statistics.unbind(-1)
        launch = _Launch(call, q, k)
        wide = q.element_size() > 2
        hopper = _hopper() if q.is_cuda else None
        if hopper and fits(call.piece, q.shape[1]) and hopper.takes_backward(call, (dout, q, dq), (k, v)):
            rows = hopper.TILES[launch.dim].keys
            (programs,) = launch.grid(launch.keys, rows, k.shape[2])
            arguments = launch.arguments(launch.keys, rows, k.shape[2])
            hopper.backward(call, dout, q, k, v, statistics, dq, dk, dv, programs, arguments)
            return
        tiles = key_gradient_tiles(launch.block_dim, wide)
        described = launch.describable((dout, q, dq), (k, v))
        add_dq = not call.deterministic
        reduced = add_dq and described and dq.is_cuda  # Triton's interpreter cannot
        key_gradient_kernel[launch.grid(launch.keys, tiles.keys, k.shape[2])](
            launch.query_source(dout, tiles.queries, described),
            launch.query_source(q, tiles.queries, described),
            launch.key_source(k, tiles.keys, described),
            launch.key_source(v, tiles.keys, described),
            lse,
            delta,
            launch.query_source(dq, tiles.queries, reduced),
            dk,
            dv,
            *(x.stride()[:3] for x in (dout, q, k, v, lse, delta, dq, dk, dv)),
            *launch.arguments(launch.keys, tiles.keys, k.shape[2]),
            **launch.constants(described),
            FRESH=call.fresh,
            ADD_DQ=add_dq,
            REDUCE=reduced,
            **tiles.options,
        )
        if add_dq:
            return
        tiles = query_gradient_tiles(launch.block_dim, wide)
        query_gradient_kernel[launch.grid(launch.queries, tiles.queries, q.shape[2])](
            launch.query_source(dout, tiles.queries, described),
            launch.query_source(q, tiles.queries, described),
            launch.key_source(k, tiles.keys, described),
            launch.key_source(v, tiles.keys, described),
            lse,
            delta,
            dq,
            *(x.stride()[:3] for x in (dout, q, k, v, lse, delta, dq)),
            *launch.arguments(launch.queries, tiles.queries, q.shape[2]),
            **launch.constants(described),
            **tiles.options,
        )


@lru_cache(maxsize=1)
def _hopper() -> ModuleType | None:
    """The kernels in Gluon, an experimental part of Triton that changes with every release."""
    if triton.__version__.startswith(HOPPER_TRITON):
        return importlib.import_module("longnet_dist.kernels.hopper_kernel")
    _log.warning(
        "dilated attention runs its portable backward kernel: the one for Hopper needs Triton %s, not %s",
        HOPPER_TRITON,
        triton.__version__,
    )
    return None


class _Launch:
    """What the kernels are told about a call.

    Attributes:
        queries: the most queries that a (segment, head) of the piece has.
        keys: the most keys.
    """

    def __init__(self, call: Call, q: Tensor, k: Tensor) -> None:
        self.call, self.piece = call, call.piece
        self.batch, _, heads, self.dim = q.shape
        self.block_dim = _block_dim(self.dim)
        self.group = heads // k.shape[2]
        self.tensor_cores = q.dtype != torch.float32
        piece = self.piece
        width = piece.segment_length
        self.queries = -(-min(width, piece.query_stop - piece.query_start) // piece.dilation_rate)
        self.keys = -(-min(width, piece.key_stop - piece.first_segment * width) // piece.dilation_rate)

    def grid(self, rows: int, tile: int, heads: int) -> tuple[int]:
        return (-(-rows // tile) * self.piece.num_segments * self.batch * heads,)

    def arguments(self, rows: int, tile: int, heads: int) -> tuple[Any, ...]:
        piece = self.piece
        return (
            -(-rows // tile),
            piece.num_segments,
            heads,
            self.group,
            _head_block(self.call.offsets),
            piece.segment_length,
            piece.dilation_rate,
            piece.first_segment,
            piece.window_start,
            piece.query_start,
            piece.query_stop,
            piece.key_stop,
            self.call.scale,
        )

    def constants(self, described: bool) -> dict[str, Any]:
        return {
            "D": self.dim,
            "BLOCK_D": self.block_dim,
            "CAUSAL": self.call.causal,
            "COMPACT": self.piece.compact,
            "DESCRIPTORS": described,
            "PRECISION": "tf32" if self.tensor_cores else "ieee",
        }

    def describable(self, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> bool:
        """Whether the copy engine can see all these buffers as ``(B, rows / r, r, H, D)``."""
        rate = self.piece.dilation_rate
        return (
            fits(self.piece, queries[0].shape[1])
            and all(_describable(x, rate) for x in queries)
            and all(_describable(x, self._key_rate) for x in keys)
        )

    def query_source(self, x: Tensor, rows: int, described: bool) -> Tensor | TensorDescriptor:
        """A buffer of query rows as the kernel wants it."""
        return _descriptor(x, self.piece.dilation_rate, rows) if described else x

    def key_source(self, x: Tensor, rows: int, described: bool) -> Tensor | TensorDescriptor:
        """A buffer of key rows as the kernel wants it."""
        return _descriptor(x, self._key_rate, rows) if described else x

    @property
    def _key_rate(self) -> int:
        return 1 if self.piece.compact else self.piece.dilation_rate


def fits(piece: Piece, rows: int) -> bool:
    """Whether all rows of the piece stand in ``rows // r`` whole rows of the view ``(rows / r, r, ...)``.

    A last row that is not whole would let the copy engine read behind the buffer.
    """
    whole = rows // piece.dilation_rate * piece.dilation_rate
    return max(piece.query_stop, 0 if piece.compact else piece.key_stop) - piece.window_start <= whole


def _parts(call: Call, rows: int) -> Iterator[Call]:
    """The call, cut before its last segment where that reaches rows that the copy engine cannot see (``fits``)."""
    piece = call.piece
    if fits(piece, rows) or piece.num_segments == 1:
        yield call
        return
    cut = (piece.first_segment + piece.num_segments - 1) * piece.segment_length
    most = replace(piece, num_segments=piece.num_segments - 1, query_stop=cut, key_stop=cut)
    last = replace(piece, first_segment=piece.first_segment + piece.num_segments - 1, num_segments=1, query_start=cut)
    for part in (most, last):
        yield replace(call, piece=part)


def _describable(x: Tensor, rate: int) -> bool:
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    return aligned and x.shape[1] >= rate


def _descriptor(x: Tensor, rate: int, rows: int) -> TensorDescriptor:
    batch, length, heads, dim = x.shape
    stride = x.stride()
    return TensorDescriptor(
        x,
        [batch, length // rate, rate, heads, dim],
        [stride[0], rate * stride[1], stride[1], stride[2], 1],
        [1, rows, 1, 1, _block_dim(dim)],
    )


def _block_dim(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _head_block(offsets: tuple[int, ...]) -> int:
    """The ``b`` for which head ``h`` has offset ``(h // b) % r``: 1 under "modulo", ``ceil(H / r)`` under "blocked"."""
    return next((head for head, offset in enumerate(offsets) if offset), len(offsets))
