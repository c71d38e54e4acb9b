# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
# ruff: noqa: RUF005 (Triton's compiler adds tuples, but does not unpack them)
"""Gradient of a LayerNorm of the model's width, added to the residual path's, with the sums of rows, in one pass.

Inductor sums the rows in kernels of their own, or holds a row and its sums less well. The algebra is that of
:mod:`longnet_dist.ops.norm_gradients.reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longnet_dist.numerics import COMPILE, processors

THREADS = 128
"""Of a program, each of which takes eight numbers of every piece of a row."""
PROGRAMS = 3
"""For each of the device's processors."""
PIECES = 5
"""Most pieces of a row whose numbers, with two sums each, fit in registers."""


@torch.library.custom_op(
    "longnet_dist::norm_gradients",
    mutates_args=("dx", "delta"),
    schema="(Tensor dy, Tensor x, Tensor? residual_grad, float eps, bool sums, bool normed, Tensor(a!) dx, "
    "Tensor(b!)? delta) -> (Tensor, Tensor)",
)
def norm_gradients(
    dy: Tensor,
    x: Tensor,
    residual_grad: Tensor | None,
    eps: float,
    sums: bool,
    normed: bool,
    dx: Tensor,
    delta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute what ``reference.py`` does, for contiguous rows of a length that :func:`fits` accepts.

    ``delta`` needs heads that :func:`fits_heads` accepts.
    """
    rows, length = x.shape
    piece = _piece(length)
    at_once = 8 * THREADS // piece
    programs = min(triton.cdiv(rows, at_once), PROGRAMS * processors(x.device))
    parts = x.new_empty(programs, 2, length, dtype=torch.float32) if sums else x.new_empty(0)
    y = torch.empty_like(x) if normed else x.new_empty(0)
    _norm_gradients_kernel[(programs,)](
        dy,
        x,
        x if residual_grad is None else residual_grad,
        dx,
        parts,
        x if delta is None else delta,
        y,
        rows,
        eps,
        length,
        piece,
        at_once,
        0 if delta is None else delta.shape[1],
        residual_grad is not None,
        sums,
        normed,
        num_warps=THREADS // 32,
        **COMPILE,
    )
    return parts.sum(0) if sums else parts, y


@norm_gradients.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    residual_grad: Tensor | None,
    eps: float,
    sums: bool,
    normed: bool,
    dx: Tensor,
    delta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    total = x.new_empty(2, x.shape[1], dtype=torch.float32) if sums else x.new_empty(0)
    return total, torch.empty_like(x) if normed else x.new_empty(0)


def fits(length: int) -> bool:
    """Return whether a row of ``length`` numbers and its sums fit in registers."""
    return _piece(length) >= 64 and length <= PIECES * _piece(length)


def fits_heads(length: int, heads: int) -> bool:
    """Return whether a piece of a row holds whole heads."""
    return fits(length) and _piece(length) * heads % length == 0


def _piece(length: int) -> int:
    """Return the numbers of a piece: a power of two that divides the row, for one warp a row where that is enough."""
    return min(length & -length, 256 if length <= 1024 else 512 if length <= 2560 else 1024)


@triton.jit
def _add(a, b, x, y):
    return a + x, b + y


@triton.jit
def _norm_gradients_kernel(
    dy, x, residual_grad, dx, sums, delta, normed, rows, eps,
    LENGTH: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
    RESIDUAL: tl.constexpr, SUMS: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Compute ``ROWS`` rows from ``ROWS·p``, ``ROWS·(p + P)``, … in program ``p`` of ``P``; sum them in ``sums[p]``.

    ``dy, x, residual_grad, dx (rows, LENGTH)``, of which ``residual_grad`` and ``dx`` may be one;
    ``sums (P, 2, LENGTH)``; ``delta (rows, HEADS)`` if there are heads;
    ``normed (rows, LENGTH)`` if ``NORMED``.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, PIECE)[None, :]
    nothing = tl.zeros((ROWS, PIECE), tl.float32)
    PIECE_HEADS: tl.constexpr = HEADS * PIECE // LENGTH  # heads of a piece
    dx_sums, residual_sums = (), ()
    for _ in tl.static_range(LENGTH // PIECE):
        dx_sums, residual_sums = dx_sums + (nothing,), residual_sums + (nothing,)
    for row in tl.range(program * ROWS, rows, programs * ROWS, num_stages=2):
        index = row + tl.arange(0, ROWS)[:, None]
        valid = index < rows
        start = index.to(tl.int64) * LENGTH + columns
        xs, dys = (), ()
        x_sum, dy_sum = nothing, nothing
        for first in tl.static_range(0, LENGTH, PIECE):
            x_piece = tl.load(x + start + first, mask=valid, other=0.0).to(tl.float32)
            dy_piece = tl.load(dy + start + first, mask=valid, other=0.0).to(tl.float32)
            xs, dys = xs + (x_piece,), dys + (dy_piece,)
            x_sum, dy_sum = x_sum + x_piece, dy_sum + dy_piece
        # μ and mean(dy) of each row.
        mean, dy_mean = tl.reduce((x_sum, dy_sum), 1, _add)
        mean, dy_mean = (mean / LENGTH)[:, None], (dy_mean / LENGTH)[:, None]
        squares, products = nothing, nothing
        for i in tl.static_range(LENGTH // PIECE):
            centred = xs[i] - mean
            squares, products = squares + centred * centred, products + centred * dys[i]
        variance, projection = tl.reduce((squares, products), 1, _add)
        scale = tl.rsqrt(variance / LENGTH + eps)[:, None]  # 1/σ
        # With x̂ = (x - μ)/σ: x̂ mean(dy∘x̂)/σ = (x - μ) · mean(dy∘(x - μ))/σ³.
        projection = (projection / LENGTH)[:, None] * scale * scale * scale
        new_dx_sums, new_residual_sums = (), ()
        for i in tl.static_range(LENGTH // PIECE):
            # J_LNᵀ dy = (dy - mean(dy))/σ - x̂ mean(dy∘x̂)/σ.
            dx_piece = (dys[i] - dy_mean) * scale - (xs[i] - mean) * projection
            at = start + i * PIECE
            if RESIDUAL:
                # dx = residual_grad + J_LNᵀ dy.
                residual = tl.load(residual_grad + at, mask=valid, other=0.0).to(tl.float32)
                dx_piece += residual
                if SUMS:
                    new_residual_sums = new_residual_sums + (residual_sums[i] + residual,)
            if NORMED:
                tl.store(normed + at, (xs[i] - mean) * scale, mask=valid)
            rounded = dx_piece.to(dx.dtype.element_ty)
            tl.store(dx + at, rounded, mask=valid)
            if HEADS:
                # delta = rowsum(dx ∘ x) of each head, from dx as it was rounded: the attention's backward reads that.
                products = tl.reshape(rounded.to(tl.float32) * xs[i], (ROWS, PIECE_HEADS, PIECE // PIECE_HEADS))
                place = index.to(tl.int64) * HEADS + i * PIECE_HEADS + tl.arange(0, PIECE_HEADS)[None, :]
                tl.store(delta + place, tl.sum(products, 2), mask=valid)
            if SUMS:
                new_dx_sums = new_dx_sums + (dx_sums[i] + dx_piece,)
        if SUMS:
            dx_sums = new_dx_sums
            if RESIDUAL:
                residual_sums = new_residual_sums
    if SUMS:
        # Σ dx and Σ residual_grad over the program's rows; the caller adds up the programs.
        place = sums + program.to(tl.int64) * 2 * LENGTH + tl.arange(0, PIECE)
        for i in tl.static_range(LENGTH // PIECE):
            tl.store(place + i * PIECE, tl.sum(dx_sums[i], 0))
            tl.store(place + LENGTH + i * PIECE, tl.sum(residual_sums[i], 0))
