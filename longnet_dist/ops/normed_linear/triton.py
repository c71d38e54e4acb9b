# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Linear layers behind a LayerNorm on few rows, in one kernel with what follows them.

The weights of a layer are read in the time that a kernel takes to start. In torch the norm, each linear layer, the
activation and the residual sum are kernels of their own. Here every program norms all rows again, which are few, and
multiplies them by some columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor, nn

from longnet_dist.numerics import COMPILE, block_dim

# What the speed depends on: benchmarks/decode_kernels.py measures other values.
COLUMNS = 32
"""Outputs of a program."""
PIECE = 256
"""Inputs of each row that a program takes at once, half as many of float32."""
WARPS = 4
STAGES = 3
"""Blocks of inputs and weights whose loads are under way at once."""


def normed_linear(
    x: Tensor, norm: nn.LayerNorm, layers: Sequence[nn.Linear], residual: Tensor | None = None, gelu: bool = False
) -> Tensor:
    """Compute what ``reference.py`` does for at most ``choice.MOST_ROWS`` rows and one or three layers.

    All tensors are of one dtype; weights are contiguous. The norm is computed in float32 and rounded once, as torch
    does; matmuls are summed in float32.
    """
    (rows, depth), x = x.shape, x.contiguous()
    widths = [layer.out_features for layer in layers]
    out = x.new_empty(rows, sum(widths))
    first, last = layers[0], layers[-1]
    second = layers[len(layers) // 2]
    padded, piece = block_dim(rows), 2 * PIECE // x.element_size()
    _normed_linear_kernel[(sum(triton.cdiv(width, COLUMNS) for width in widths),)](
        x, norm.weight, norm.bias, first.weight, second.weight, last.weight, first.bias, second.bias, last.bias,
        x if residual is None else residual.contiguous(), out, rows, norm.eps, depth,
        widths[0], widths[len(layers) // 2], widths[-1], sum(widths), padded, COLUMNS, piece,
        len(layers) == 3, residual is not None, gelu, STAGES, num_warps=WARPS, **COMPILE,
    )  # fmt: skip
    return out


@triton.jit
def _load_inputs(x, row, depth, rows, DEPTH: tl.constexpr):
    """Return the inputs ``depth`` of all rows, in float32."""
    inside = (row < rows)[:, None] & (depth < DEPTH)[None, :]
    return tl.load(x + row[:, None] * DEPTH + depth[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _normed_linear_kernel(
    x, gain, shift, weight, second_weight, third_weight, bias, second_bias, third_bias, residual, out, rows, eps,
    DEPTH: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, THREE: tl.constexpr, RESIDUAL: tl.constexpr,
    GELU: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute ``COLUMNS`` outputs of a layer, for all of at most ``ROWS`` rows.

    ``x (rows, DEPTH)``; weights ``(FIRST, DEPTH)`` and, with ``THREE``, ``(SECOND, DEPTH)`` and ``(THIRD, DEPTH)``;
    ``residual, out (rows, WIDTH)``. Programs of a layer follow those of the layer before.
    """
    tile, offset, outputs = tl.program_id(0), 0, FIRST
    if THREE:
        TILES: tl.constexpr = (FIRST + COLUMNS - 1) // COLUMNS
        MORE: tl.constexpr = (SECOND + COLUMNS - 1) // COLUMNS
        if tile >= TILES + MORE:
            weight, bias = third_weight, third_bias
            tile, offset, outputs = tile - TILES - MORE, FIRST + SECOND, THIRD
        elif tile >= TILES:
            weight, bias = second_weight, second_bias
            tile, offset, outputs = tile - TILES, FIRST, SECOND
    row, column = tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    mean, squares = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, DEPTH, PIECE, num_stages=STAGES):
        depth = first + tl.arange(0, PIECE)
        piece = _load_inputs(x, row, depth, rows, DEPTH)
        # Mean and sum of squared deviations of a piece join those of all before it (Chan, Golub and LeVeque 1983).
        size = tl.minimum(DEPTH - first, PIECE).to(tl.float32)
        own = tl.sum(piece, 1) / size
        deviation = tl.where((depth < DEPTH)[None, :], piece - own[:, None], 0.0)
        share, difference = size / (first + size), own - mean
        squares += tl.sum(deviation * deviation, 1) + difference * difference * first * share
        mean += difference * share
    scale = tl.rsqrt(squares / DEPTH + eps)  # 1/σ
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, DEPTH, PIECE, num_stages=STAGES):
        depth = first + tl.arange(0, PIECE)
        inside = depth < DEPTH
        factor = tl.load(gain + depth, mask=inside, other=0.0).to(tl.float32)
        constant = tl.load(shift + depth, mask=inside, other=0.0).to(tl.float32)
        piece = _load_inputs(x, row, depth, rows, DEPTH)
        normed = (piece - mean[:, None]) * scale[:, None] * factor[None, :] + constant[None, :]
        weights = tl.load(
            weight + column[None, :].to(tl.int64) * DEPTH + depth[:, None],
            mask=inside[:, None] & (column < outputs)[None, :],
            other=0.0,
        )
        sums += tl.dot(normed.to(weights.dtype), weights, input_precision="ieee")
    inside = (row < rows)[:, None] & (column < outputs)[None, :]
    sums += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    at = row[:, None] * WIDTH + offset + column[None, :]
    # Between two operations torch rounds to the dtype of the result.
    if GELU:
        h = sums.to(out.dtype.element_ty).to(tl.float32)
        sums = 0.5 * h * (1.0 + tl.erf(0.7071067811865476 * h))
    if RESIDUAL:
        sums = sums.to(out.dtype.element_ty).to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(
            tl.float32
        )
    tl.store(out + at, sums, mask=inside)
