# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
# ruff: noqa: RUF005 (Triton's compiler adds tuples, but does not unpack them)
"""``LayerNorm(gelu(h))``, the middle of a feed-forward network, and its gradient, each in one pass over the rows.

Rows of thousands of numbers are too long for Inductor's kernels. They read a row twice forward and three times
backward, or waste a quarter of their registers, and their error function costs as much time as the memory.
Here a row lies in registers, in pieces of a power of two, and one exponential gives both gelu and its derivative.
The algebra is that of :mod:`longnet_dist.ops.gelu_norm.reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longnet_dist.numerics import COMPILE, processors
from longnet_dist.ops.row_moments import row_moments

LONGEST = 10240
"""Numbers of a row that fit in the registers of a program."""


class _RowLayout(NamedTuple):
    """Say how a row is spread over the threads of a program; these are the fastest of those measured on an H100.

    Attributes:
        warps: of a program.
        piece: most numbers of a piece.
        programs: of the gradients, for each of the device's processors.
    """

    warps: int
    piece: int = 1024
    programs: int = 1

    @classmethod
    def of(cls, length: int) -> _RowLayout:
        """Return the layout of the forward kernel for rows of ``length`` numbers."""
        return cls(4 if length <= 4096 else 8)

    @classmethod
    def of_gradients(cls, length: int) -> _RowLayout:
        """Return the layout of the gradients' kernel."""
        return cls(4, 1024, 3) if length <= 4096 else cls(8, 2048, 2)

    def split(self, length: int) -> int:
        """Return the numbers of a piece: the largest power of two that divides the row, at most :attr:`piece`."""
        return min(length & -length, self.piece)


@torch.library.custom_op(
    "longnet_dist::gelu_norm",
    mutates_args=(),
    schema="(Tensor h, Tensor? weight, Tensor? bias, float eps) -> Tensor",
)
def gelu_norm(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return ``LayerNorm(gelu(h)) (rows, F)``, computed in float32, in the dtype of ``h``.

    Args:
        h: ``(rows, F)``, contiguous, ``F`` at most ``LONGEST``.
        weight, bias: of the norm, ``(F,)``; None for 1 and 0.
        eps: of the norm.
    """
    rows, length = h.shape
    y, layout = torch.empty_like(h), _RowLayout.of(length)
    affine = weight is not None
    _gelu_norm_kernel[(rows,)](
        h,
        weight if affine else h,
        bias if affine else h,
        y,
        eps,
        length,
        layout.split(length),
        affine,
        num_warps=layout.warps,
        **COMPILE,
    )
    return y


def gelu_norm_gradients(dy: Tensor, h: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``y``, ``dh (rows, F)`` and the float32 sum ``(F,)`` of the rows of ``dh``, for a norm without weights.

    ``y`` overwrites ``h``, and ``dh`` overwrites ``dy``: no tensors of a block's backward are larger.

    Args:
        dy: gradient of ``y = LayerNorm(gelu(h))``, ``(rows, F)``, contiguous.
        h, eps: as in :func:`gelu_norm`.
    """
    return h, dy, _gelu_norm_gradients(dy, h, eps)


@torch.library.custom_op(
    "longnet_dist::gelu_norm_gradients",
    mutates_args=("dy", "h"),
    schema="(Tensor(a!) dy, Tensor(b!) h, float eps) -> Tensor",
)
def _gelu_norm_gradients(dy: Tensor, h: Tensor, eps: float) -> Tensor:
    rows, length = h.shape
    layout = _RowLayout.of_gradients(length)
    programs = min(rows, layout.programs * processors(h.device))
    sums = h.new_empty(programs, length, dtype=torch.float32)
    _gelu_norm_gradients_kernel[(programs,)](
        dy, h, sums, rows, eps, length, layout.split(length), num_warps=layout.warps, **COMPILE
    )
    return sums.sum(0)


@gelu_norm.register_fake
def _(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(h)


@_gelu_norm_gradients.register_fake
def _(dy: Tensor, h: Tensor, eps: float) -> Tensor:
    return h.new_empty(h.shape[1], dtype=torch.float32)


def fits(length: int) -> bool:
    """Return whether rows of ``length`` numbers fit in registers, in at most 16 pieces."""
    return length <= LONGEST and length <= 16 * _RowLayout.of(length).split(length)


@triton.jit
def _gelu(h):
    r"""Return ``gelu(h) = h·Φ(h)`` and its derivative ``Φ(h) + h·φ(h)``.

    :math:`Φ(-|h|) = \tfrac12 t\,p(t)\,e^{-h^2/2}` with :math:`t = 1 / (1 + 0.3275911·|h|/\sqrt 2)`: Abramowitz and
    Stegun, 7.1.26, within 7.5e-8, and better where it is small.
    """
    size = tl.abs(h)
    root = tl.rsqrt(1.0 + 0.23164188 * size)
    t = root * root  # a division takes nine instructions
    bell = tl.exp2(-0.72134752 * h * h)  # exp(-h²/2)
    # ½ t p(t), whose coefficients are half of those in the source; the tail is Φ(-|h|).
    series = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    tail = series * bell
    # φ(h) = exp(-h²/2) / √(2π). With Φ(h) = 1 - tail for h > 0 and tail otherwise,
    # gelu = h - |h|·tail or -|h|·tail, and gelu' = 1 + (|h| φ - tail) or -(|h| φ - tail).
    slope = 0.39894228 * size * bell - tail
    return tl.maximum(h, 0.0) - size * tail, tl.where(h > 0, 1.0 + slope, -slope)


@triton.jit
def _gelu_norm_kernel(h, weight, bias, y, eps, LENGTH: tl.constexpr, PIECE: tl.constexpr, AFFINE: tl.constexpr):
    """Compute one row of ``y (rows, LENGTH)`` in each program; ``weight, bias (LENGTH,)`` are read with ``AFFINE``."""
    start = tl.program_id(0).to(tl.int64) * LENGTH
    columns = tl.arange(0, PIECE)
    pieces, total = (), tl.zeros((PIECE,), tl.float32)
    for first in tl.static_range(0, LENGTH, PIECE):
        a, _ = _gelu(tl.load(h + start + first + columns).to(tl.float32))
        pieces, total = pieces + (a,), total + a
    mean = tl.sum(total) / LENGTH  # μ of a = gelu(h)
    squares = tl.zeros((PIECE,), tl.float32)
    for i in tl.static_range(LENGTH // PIECE):
        squares += (pieces[i] - mean) * (pieces[i] - mean)
    scale = tl.rsqrt(tl.sum(squares) / LENGTH + eps)  # 1/σ
    shift = -mean * scale  # â = (a - μ)/σ = a·scale + shift
    for i in tl.static_range(LENGTH // PIECE):
        at = i * PIECE + columns
        normed = pieces[i] * scale + shift
        if AFFINE:
            normed = normed * tl.load(weight + at).to(tl.float32) + tl.load(bias + at).to(tl.float32)
        tl.store(y + start + at, normed)


@triton.jit
def _gelu_norm_gradients_kernel(dy, h, sums, rows, eps, LENGTH: tl.constexpr, PIECE: tl.constexpr):
    """Compute rows ``p, p + P, …`` in program ``p`` of ``P``, in place, and sum their ``dh`` in ``sums[p] (LENGTH,)``.

    ``y`` overwrites ``h``, ``dh`` overwrites ``dy``, both ``(rows, LENGTH)``.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, PIECE)
    column_sums = ()
    for _ in tl.static_range(LENGTH // PIECE):
        column_sums = column_sums + (tl.zeros((PIECE,), tl.float32),)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=2):
        start = tl.full((), LENGTH, tl.int64) * row
        dys, pieces, slopes = (), (), ()
        a_sum = tl.zeros((PIECE,), tl.float32)
        squares, dy_sum, products = a_sum, a_sum, a_sum
        for first in tl.static_range(0, LENGTH, PIECE):
            dy_piece = tl.load(dy + start + first + columns).to(tl.float32)
            a, slope = _gelu(tl.load(h + start + first + columns).to(tl.float32))
            dys, pieces, slopes = dys + (dy_piece,), pieces + (a,), slopes + (slope,)
            a_sum, squares = a_sum + a, squares + a * a
            dy_sum, products = dy_sum + dy_piece, products + dy_piece * a
        mean, scale, dy_mean, projection = row_moments(a_sum, squares, dy_sum, products, eps, LENGTH)
        shift, dy_shift = -mean * scale, -dy_mean * scale
        new_sums = ()
        for i in tl.static_range(LENGTH // PIECE):
            normed = pieces[i] * scale + shift  # y
            # da = dy/σ - mean(dy)/σ - y mean(dy∘y)/σ, and dh = da ∘ gelu'(h).
            dh = (dys[i] * scale + dy_shift - normed * projection) * slopes[i]
            at = start + i * PIECE + columns
            tl.store(h + at, normed)
            tl.store(dy + at, dh)
            new_sums = new_sums + (column_sums[i] + dh,)
        column_sums = new_sums
    for i in tl.static_range(LENGTH // PIECE):
        tl.store(sums + program.to(tl.int64) * LENGTH + i * PIECE + columns, column_sums[i])
