# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
# ruff: noqa: RUF005 (Triton's compiler adds tuples, but does not unpack them)
"""``LayerNorm(silu(g) ∘ u)``, the middle of a gated feed-forward network, and its gradient, each in one kernel.

The forward kernel reads a row once. That of the gradients reads it twice, the second time from a cache: a row of
thousands of numbers, with the sums of its gradients, does not fit in registers. The algebra is that of
:mod:`longnet_dist.ops.gated_norm.reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longnet_dist.numerics import COMPILE, processors
from longnet_dist.ops.row_moments import row_moments

LONGEST = 14336
"""The largest inner dim ``F`` whose sums fit in the registers of a program."""
PIECES = 16
"""Most pieces of a row."""


def fits(length: int) -> bool:
    """Return whether rows of ``length`` numbers fit in registers, in at most :data:`PIECES` pieces."""
    return length <= LONGEST and length <= PIECES * _piece(length, _warps(length))


def _warps(length: int) -> int:
    """Return the warps of a program of the gradients: a thread holds at most 56 sums."""
    return 4 if length <= 3072 else 8 if length <= 6144 else 16


def _piece(length: int, warps: int) -> int:
    """Return the numbers of a piece: the largest power of two that divides the row, at most 8 for each thread."""
    return min(length & -length, 256 * warps)


@torch.library.custom_op(
    "longnet_dist::gated_norm",
    mutates_args=(),
    schema="(Tensor h, Tensor? weight, Tensor? bias, float eps) -> Tensor",
)
def gated_norm(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return ``LayerNorm(silu(g) ∘ u) (rows, F)``, computed in float32, in the dtype of ``h``.

    Args:
        h: ``[g, u] (rows, 2·F)``, contiguous; :func:`fits` must accept ``F``.
        weight, bias: of the norm, ``(F,)``; None for 1 and 0.
        eps: of the norm.
    """
    rows, length = h.shape[0], h.shape[1] // 2
    y = h.new_empty(rows, length)
    affine, warps = weight is not None, 4 if length <= 4096 else 8
    _gated_norm_kernel[(rows,)](
        h,
        weight if affine else h,
        bias if affine else h,
        y,
        eps,
        length,
        _piece(length, warps),
        affine,
        num_warps=warps,
        **COMPILE,
    )
    return y


def gated_norm_gradients(dy: Tensor, h: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``y``, ``dh (rows, 2·F)`` and the float32 sum ``(2·F,)`` of the rows of ``dh``.

    The norm has no weights. ``y`` overwrites ``dy``, and ``dh`` overwrites ``h``.

    Args:
        dy: gradient of ``y = LayerNorm(silu(g) ∘ u)``, ``(rows, F)``, contiguous.
        h, eps: as in :func:`gated_norm`.
    """
    return dy, h, _gated_norm_gradients(dy, h, eps)


@torch.library.custom_op(
    "longnet_dist::gated_norm_gradients",
    mutates_args=("dy", "h"),
    schema="(Tensor(a!) dy, Tensor(b!) h, float eps) -> Tensor",
)
def _gated_norm_gradients(dy: Tensor, h: Tensor, eps: float) -> Tensor:
    rows, length = dy.shape
    warps = _warps(length)
    programs = min(rows, 16 // warps * processors(h.device))
    sums = h.new_empty(programs, 2 * length, dtype=torch.float32)
    _gated_norm_gradients_kernel[(programs,)](
        dy, h, sums, rows, eps, length, _piece(length, warps), num_warps=warps, **COMPILE
    )
    return sums.sum(0)


@gated_norm.register_fake
def _(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return h.new_empty(h.shape[0], h.shape[1] // 2)


@_gated_norm_gradients.register_fake
def _(dy: Tensor, h: Tensor, eps: float) -> Tensor:
    return h.new_empty(h.shape[1], dtype=torch.float32)


@triton.jit
def _logistic(g):
    t = tl.exp2(-1.4426950408889634 * tl.abs(g))  # exp(-|g|), which cannot overflow
    return tl.where(g > 0, 1.0, t) / (1.0 + t)  # S(g)


@triton.jit
def _gated_norm_kernel(h, weight, bias, y, eps, LENGTH: tl.constexpr, PIECE: tl.constexpr, AFFINE: tl.constexpr):
    """Compute one row of ``y (rows, LENGTH)`` in each program; ``weight, bias (LENGTH,)`` are read with ``AFFINE``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PIECE)
    gates, ups = h + row * 2 * LENGTH + columns, h + row * 2 * LENGTH + LENGTH + columns
    pieces, total = (), tl.zeros((PIECE,), tl.float32)
    for first in tl.static_range(0, LENGTH, PIECE):
        g, u = tl.load(gates + first).to(tl.float32), tl.load(ups + first).to(tl.float32)
        a = g * _logistic(g) * u
        pieces, total = pieces + (a,), total + a
    mean = tl.sum(total) / LENGTH  # μ of a = silu(g) ∘ u
    squares = tl.zeros((PIECE,), tl.float32)
    for i in tl.static_range(LENGTH // PIECE):
        squares += (pieces[i] - mean) * (pieces[i] - mean)
    scale = tl.rsqrt(tl.sum(squares) / LENGTH + eps)  # 1/σ
    for i in tl.static_range(LENGTH // PIECE):
        at = i * PIECE + columns
        normed = (pieces[i] - mean) * scale
        if AFFINE:
            normed = normed * tl.load(weight + at).to(tl.float32) + tl.load(bias + at).to(tl.float32)
        tl.store(y + row * LENGTH + at, normed)


@triton.jit
def _gated_norm_gradients_kernel(dy, h, sums, rows, eps, LENGTH: tl.constexpr, PIECE: tl.constexpr):
    """Compute rows ``p, p + P, …`` in program ``p`` of ``P``, in place, and sum their ``dh`` in ``sums[p]``.

    ``y`` overwrites ``dy (rows, LENGTH)``, ``dh`` overwrites ``h (rows, 2·LENGTH)``; ``sums (P, 2·LENGTH)``.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, PIECE)
    gate_sums, up_sums = (), ()
    for _ in tl.static_range(LENGTH // PIECE):
        gate_sums, up_sums = gate_sums + (tl.zeros((PIECE,), tl.float32),), up_sums + (tl.zeros((PIECE,), tl.float32),)
    for row in tl.range(program, rows, tl.num_programs(0)):
        start = tl.full((), LENGTH, tl.int64) * row
        gradient, gates, ups = dy + start + columns, h + 2 * start + columns, h + 2 * start + LENGTH + columns
        a_sum = tl.zeros((PIECE,), tl.float32)
        squares, dy_sum, products = a_sum, a_sum, a_sum
        for first in tl.static_range(0, LENGTH, PIECE):
            d = tl.load(gradient + first).to(tl.float32)
            g, u = tl.load(gates + first).to(tl.float32), tl.load(ups + first).to(tl.float32)
            a = g * _logistic(g) * u
            a_sum, squares = a_sum + a, squares + a * a
            dy_sum, products = dy_sum + d, products + d * a
        mean, scale, dy_mean, projection = row_moments(a_sum, squares, dy_sum, products, eps, LENGTH)
        new_gate_sums, new_up_sums = (), ()
        for i in tl.static_range(LENGTH // PIECE):
            at = i * PIECE
            d = tl.load(gradient + at).to(tl.float32)
            g, u = tl.load(gates + at).to(tl.float32), tl.load(ups + at).to(tl.float32)
            logistic = _logistic(g)
            silu = g * logistic
            normed = (silu * u - mean) * scale  # y
            # da = dy/σ - mean(dy)/σ - y mean(dy∘y)/σ; du = da ∘ silu(g), dg = da ∘ u ∘ silu'(g).
            da = (d - dy_mean) * scale - normed * projection
            du, dg = da * silu, da * u * (logistic + silu * (1.0 - logistic))
            tl.store(gradient + at, normed)
            tl.store(gates + at, dg)
            tl.store(ups + at, du)
            new_gate_sums, new_up_sums = new_gate_sums + (gate_sums[i] + dg,), new_up_sums + (up_sums[i] + du,)
        gate_sums, up_sums = new_gate_sums, new_up_sums
    place = sums + program.to(tl.int64) * 2 * LENGTH + columns
    for i in tl.static_range(LENGTH // PIECE):
        tl.store(place + i * PIECE, gate_sums[i])
        tl.store(place + LENGTH + i * PIECE, up_sums[i])
