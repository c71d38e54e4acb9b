"""The Triton backend: one launch a piece forward, one or two backward, in place on strided rows."""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
import triton
from torch import Tensor

from longnet_dist.attention.kernels.contract import BackwardInputs, Call, Gradients, SoftmaxStatistics
from longnet_dist.attention.kernels.hopper import support
from longnet_dist.attention.kernels.triton.backward import key_gradient_kernel, query_gradient_kernel, statistics_kernel
from longnet_dist.attention.kernels.triton.forward import forward_kernel
from longnet_dist.attention.kernels.triton.launch import (
    BACKWARD_SIDES,
    FORWARD_SIDES,
    Geometry,
    Launch,
    Problem,
    View,
    block_view,
)
from longnet_dist.attention.kernels.triton.together import Waiting, compile_together
from longnet_dist.caches import bounded_cache
from longnet_dist.numerics import block_dim, log_once, wide_dtype


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows of a tile of queries and of keys, and how the compiler shall lay them out."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def constants(self) -> dict[str, int]:
        return {"QUERIES": self.queries, "KEYS": self.keys}

    @property
    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


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
    merges_overlaps = True

    def accumulator_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def gradient_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        return wide_dtype(dtype), dtype

    def prepare(self, call: Call, q: Tensor) -> None:
        """List the tiles of a piece with a table of segments: see :meth:`Kernel.prepare`."""
        hopper, geometry = _hopper(q.device), Geometry.of(q)
        if call.piece.table is not None and hopper and hopper.takes_tables(call.deterministic):
            for part in Problem(call, geometry, geometry).parts(split_tables=True):
                hopper.prepare(part)

    def compile(self, calls: Sequence[Call], q: Tensor, k: Tensor, v: Tensor, backward: bool) -> None:
        """Compile what was not compiled yet, side by side: see :meth:`Kernel.compile`."""
        if q.device.type != "cuda":
            return
        form = (*map(_form, calls), q.shape[2:], k.shape[2], q.dtype, q.device, backward)
        _compile(_Compilation(form, tuple(calls), Geometry.of(q), Geometry.of(k), Geometry.of(v), backward))

    def forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge the keys of the piece into the running ``(out, lse)``: see :meth:`Kernel.forward`."""
        for launch in _forward(call, *map(Geometry.of, (q, k, v, out, lse))):
            launch(q, k, v, out, out, lse)

    def start_backward(
        self,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        scratch: Tensor | None = None,
        delta: Tensor | None = None,
        dlse: Tensor | None = None,
    ) -> SoftmaxStatistics:
        batch, rows, heads, _ = out.shape
        needed = batch * heads * rows * 2 * lse.element_size()
        if scratch is not None and scratch.nbytes >= needed:
            space = scratch.flatten()[: needed // scratch.element_size()].view(lse.dtype)
        else:
            space = lse.new_empty(batch * heads * rows * 2)
        statistics = space.view(batch, heads, rows, 2).transpose(1, 2)
        tensors = (dout, out if delta is None else delta, lse, statistics, dq)
        _statistics(*map(Geometry.of, tensors))(*tensors)
        return (statistics,)

    def backward(self, call: Call, given: BackwardInputs, sums: Gradients) -> None:
        """Add the piece's part of dQ, dK and dV: see :meth:`Kernel.backward`."""
        tensors = (given.dout, given.q, given.k, given.v, *given.statistics, *sums)
        for launch in _backward(call, *map(Geometry.of, tensors)):
            launch(*tensors)


@bounded_cache(maxsize=512)
def _forward(call: Call, q: Geometry, k: Geometry, v: Geometry, out: Geometry, lse: Geometry) -> tuple[Launch, ...]:
    """On ``q, k, v``, ``out`` as a source of tiles, ``out, lse``."""
    whole = (q, k, v, out, lse)
    hopper, launches = _hopper(q.device), []
    for part in Problem(call, q, k).parts(bool(hopper and hopper.takes_tables(call.deterministic))):
        buffers = part.seen(whole, FORWARD_SIDES[:5])
        if hopper and hopper.takes_forward(part, buffers):
            launches.append(hopper.forward_launch(part, buffers))
        else:
            launches.append(_portable_forward(part, *buffers))
    return tuple(launches)


@dataclass(frozen=True)
class _Compilation:
    """Calls whose kernels are compiled; others of the same form need no others."""

    form: Hashable
    calls: tuple[Call, ...] = field(compare=False)
    q: Geometry = field(compare=False)
    k: Geometry = field(compare=False)
    v: Geometry = field(compare=False)
    backward: bool = field(compare=False)


@bounded_cache(maxsize=512)
def _compile(wanted: _Compilation) -> None:
    """Compile the kernels of a form; what is kept is that it was done."""
    compile_together(_launches(wanted.calls, wanted.q, wanted.k, wanted.v, wanted.backward))


def _form(call: Call) -> Hashable:
    """Return what of a call most kernels are compiled for, the same for other documents."""
    piece = call.piece
    table, half = piece.table is None, (piece.half > 0) - (piece.half < 0)
    return piece.dilation_rate, half, piece.overlap_rates, piece.compact, table, call.causal, call.fresh


def _launches(calls: Sequence[Call], q: Geometry, k: Geometry, v: Geometry, backward: bool) -> list[Waiting]:
    """Return all launches of calls, those first whose kernels take longest to compile."""
    out, lse = Geometry.new(q.shape, q.dtype, q.device), _new_lse(q)
    statistics, dq = _new_statistics(q), Geometry.new(q.shape, wide_dtype(q.dtype), q.device)
    dk, dv = (Geometry.new(x.shape, x.dtype, x.device) for x in (k, v))
    buffers = (out, q, k, v, statistics, dq, dk, dv)  # the gradient of out has the form of out
    found = [(launch, buffers) for call in calls if backward for launch in _backward(call, *buffers)]
    given = (q, k, v, out, out, lse)
    return [*found, *((launch, given) for call in calls for launch in _forward(call, q, k, v, out, lse))]


def _new_lse(q: Geometry) -> Geometry:
    batch, rows, heads, _ = q.shape
    whole = Geometry.new((batch, heads, rows), wide_dtype(q.dtype), q.device)
    return whole._replace(shape=(batch, rows, heads), stride=(heads * rows, 1, rows))


def _new_statistics(q: Geometry) -> Geometry:
    """As ``start_backward`` makes them."""
    batch, rows, heads, _ = q.shape
    whole = Geometry.new((batch, heads, rows, 2), wide_dtype(q.dtype), q.device)
    return whole._replace(shape=(batch, rows, heads, 2), stride=(2 * heads * rows, 2, 2 * rows, 1))


def _portable_forward(problem: Problem, q: Geometry, k: Geometry, v: Geometry, out: Geometry, lse: Geometry) -> Launch:
    tiles = forward_tiles(problem.block_dim, problem.wide, problem.causal)
    described, heads = problem.describable((q, out), (k, v)), q.shape[2]
    constants = {"FRESH": problem.call.fresh, "LIMIT": problem.limit}
    rate, key_rate = problem.piece.dilation_rate, problem.key_rate
    views = (
        block_view(q, rate, tiles.queries),
        block_view(k, key_rate, tiles.keys),
        block_view(v, key_rate, tiles.keys),
        block_view(out, rate, tiles.queries),
    )
    return Launch(
        forward_kernel,
        problem.programs(problem.queries, tiles.queries, heads),
        (*(views if described else (None,) * 4), None, None),
        (
            *problem.numbers(problem.queries, tiles.queries, heads, q, k, v, out, lse),
            problem.table(),
            problem.heads_before,
        ),
        problem.constants(described) | tiles.constants | constants,
        tiles.options,
        problem.first_rows(FORWARD_SIDES),
    )


@bounded_cache(maxsize=64)
def _statistics(dout: Geometry, out: Geometry, lse: Geometry, statistics: Geometry, dq: Geometry) -> Launch:
    """On ``dout, out, lse, statistics, dq``, or with ``delta`` for ``out``."""
    batch, rows, heads, dim = dq.shape
    buffers = (dout, out, lse, statistics, dq)
    return Launch(
        statistics_kernel,
        batch * heads * triton.cdiv(rows, 64),
        (None,) * 5,
        (*(x.stride[:3] for x in buffers), rows, heads),
        {"D": dim, "BLOCK_D": block_dim(dim), "ROWS": 64, "DELTA": len(out.shape) == 3},
        {},
    )


@bounded_cache(maxsize=512)
def _backward(
    call: Call,
    dout: Geometry,
    q: Geometry,
    k: Geometry,
    v: Geometry,
    statistics: Geometry,
    dq: Geometry,
    dk: Geometry,
    dv: Geometry,
) -> tuple[Launch, ...]:
    """On ``dout, q, k, v, statistics, dq, dk, dv``."""
    whole = (dout, q, k, v, statistics, dq, dk, dv)
    hopper = _hopper(q.device)
    launches: list[Launch] = []
    for part in Problem(call, q, k).parts(bool(hopper and hopper.takes_tables(call.deterministic))):
        buffers = part.seen(whole, BACKWARD_SIDES)
        if hopper and hopper.takes_backward(part, buffers):
            launches.append(hopper.backward_launch(part, buffers))
        else:
            launches.append(_key_gradients(part, buffers))
        if call.deterministic:
            launches.append(_query_gradient(part, buffers))
    return tuple(launches)


def _key_gradients(problem: Problem, buffers: tuple[Geometry, ...]) -> Launch:
    """dK and dV; unless deterministic, dQ on the way."""
    q, k, dq = buffers[1], buffers[2], buffers[5]
    described, add_dq = _described(problem, buffers), not problem.call.deterministic
    reduced = add_dq and described and q.device.type == "cuda"  # Triton's interpreter cannot
    tiles, heads = key_gradient_tiles(problem.block_dim, problem.wide), k.shape[2]
    target = block_view(dq, problem.piece.dilation_rate, tiles.queries) if reduced else None
    own = {"FRESH": problem.call.fresh, "ADD_DQ": add_dq, "REDUCE": reduced}
    return Launch(
        key_gradient_kernel,
        problem.programs(problem.keys, tiles.keys, heads),
        (*_sources(problem, buffers, tiles), None, target, None, None),
        (*problem.numbers(problem.keys, tiles.keys, heads, *buffers), problem.table(), problem.heads_before),
        problem.constants(described) | tiles.constants | own,
        tiles.options,
        problem.first_rows(BACKWARD_SIDES),
    )


def _query_gradient(problem: Problem, buffers: tuple[Geometry, ...]) -> Launch:
    """dQ in a launch of its own, in an order that never changes."""
    q = buffers[1]
    tiles, heads = query_gradient_tiles(problem.block_dim, problem.wide), q.shape[2]
    return Launch(
        query_gradient_kernel,
        problem.programs(problem.queries, tiles.queries, heads),
        (*_sources(problem, buffers, tiles), None, None),
        (*problem.numbers(problem.queries, tiles.queries, heads, *buffers[:6]), problem.table(), problem.heads_before),
        problem.constants(_described(problem, buffers)) | tiles.constants,
        tiles.options,
        problem.first_rows(BACKWARD_SIDES[:6]),
    )


def _sources(problem: Problem, buffers: tuple[Geometry, ...], tiles: Tiles) -> tuple[View | None, ...]:
    """Views of ``dout, q, k, v`` for the copy engine, if it can see all buffers."""
    if not _described(problem, buffers):
        return (None,) * 4
    dout, q, k, v = buffers[:4]
    queries = (block_view(x, problem.piece.dilation_rate, tiles.queries) for x in (dout, q))
    return *queries, *(block_view(x, problem.key_rate, tiles.keys) for x in (k, v))


def _described(problem: Problem, buffers: tuple[Geometry, ...]) -> bool:
    dout, q, k, v, _, dq, _, _ = buffers
    return problem.describable((dout, q, dq), (k, v))


def _hopper(device: torch.device) -> ModuleType | None:
    """The launches of the kernels for Hopper; None where the GPU or the installed Triton has no use for them."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != support.COMPUTE_CAPABILITY:
        return None
    if obstacle := support.release_obstacle(triton.__version__):
        log_once(f"dilated attention runs its portable kernels: {obstacle}; {support.REMEDY}")
        return None
    return importlib.import_module("longnet_dist.attention.kernels.hopper.launches")
