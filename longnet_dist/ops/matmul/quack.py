# Epilogues: quack's compiler gives their values types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Matmuls by quack (from flash-attn 4's authors), which applies a function to each number of the result: a norm, a
bias, a rotation, a sum.

The norm comes *behind* the matmul. With mean μ and deviation σ of a token,
``LayerNorm(x) Wᵀ = ((x - μ)/σ) Wᵀ = scale·(x Wᵀ) + shift·(row sums of W)`` with ``scale = 1/σ`` and ``shift = -μ/σ``.
So the normed tokens are never written, only two numbers a token, and they are not rounded before they are multiplied.
"""

from __future__ import annotations

import torch
from quack.epilogue import gemm_epilogue, pack, unpack
from quack.epilogue.ops import ColVecLoad, RowVecLoad
from quack.epilogue.rotary import rotary_cos_sin_load
from quack.gemm_config import GemmConfig
from torch import Tensor

CONFIG = GemmConfig(
    tile_m=128,
    tile_n=192,
    pingpong=True,
    cluster_m=2,
    cluster_n=1,
    is_dynamic_persistent=False,
    device_capacity=9,
)
"""Two groups of warps take turns: one multiplies while the other finishes its tile."""
_BIAS = {"bias": RowVecLoad("bias")}
_NORM = _BIAS | {"scale": ColVecLoad("scale"), "shift": ColVecLoad("shift"), "sums": RowVecLoad("sums")}

ROTATED_DIMS = (64, 96)
"""Head dims for which a tile of the result holds whole heads."""


@gemm_epilogue()
def _plain(acc):
    return {"D": acc}


@gemm_epilogue(ops=_BIAS)
def _with_bias(acc, bias):
    return {"D": acc + bias}


@gemm_epilogue(ops=_BIAS)
def _with_sum(acc, c, bias):
    return {"D": acc + bias + c}


# acc = x wᵀ for an output channel with weights w, and sums = Σ w: x̂ wᵀ + b = scale·acc + shift·sums + b.
@gemm_epilogue(ops=_NORM)
def _with_norm(acc, scale, shift, sums, bias):
    return {"D": acc * scale + shift * sums + bias}


# The same on the residual path: y = x + (x̂ wᵀ + b), with c = x.
@gemm_epilogue(ops=_NORM)
def _with_norm_and_sum(acc, c, scale, shift, sums, bias):
    return {"D": acc * scale + shift * sums + bias + c}


@gemm_epilogue(ops=_NORM | {"table": rotary_cos_sin_load("table")}, mode="acc_pair")
def _with_norm_and_rotation(acc, table, scale, shift, sums, bias):
    # The query or key of a pair of channels, then R = [[cos, -sin], [sin, cos]], scaled with xPos.
    even, odd = unpack(acc * scale + sums * shift + bias)
    cos, sin = unpack(table)
    return {"D": pack(even * cos - odd * sin, odd * cos + even * sin)}


@torch.library.custom_op(
    "longnet_dist::quack_linear",
    mutates_args=("out",),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? added, Tensor(a!) out) -> ()",
)
def _quack_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    added: Tensor | None,
    out: Tensor,
) -> None:
    """Write ``scale·(x weightᵀ) + shift·(row sums of weight) + bias + added``; without bias ``x weight``."""
    if bias is None:
        _plain(x, weight, out={"D": out}, config=CONFIG)
        return
    operands = {"bias": bias[None]}
    if scale is not None and shift is not None:
        operands |= _norm_operands(weight, scale, shift)
        epilogue = _with_norm if added is None else _with_norm_and_sum
    else:
        epilogue = _with_bias if added is None else _with_sum
    epilogue(x, weight.T, added, out={"D": out}, config=CONFIG, **operands)


@_quack_linear.register_fake
def _(*given: object) -> None:
    """Return nothing: the operator writes into ``out``."""


def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens and ``scale, shift (n,)`` in float32 of a norm without weights, ``scale·x + shift``."""
    assert weight is bias is None, "the norms' weights are folded"
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)  # μ
    scale = torch.rsqrt((wide - mean).square().mean(-1) + eps)  # 1/σ
    # x̂ = (x - μ)/σ = scale·x + shift  ⇒  shift = -μ/σ.
    return x, scale, -mean.squeeze(-1) * scale


def linear(rows: tuple[Tensor, ...], weight: Tensor, bias: Tensor, added: Tensor | None) -> Tensor:
    """Return ``tokens weightᵀ + bias + added``."""
    out = rows[0].new_empty(len(rows[0]), len(weight))
    write_linear(rows, weight, bias, added, out)
    return out


def write_linear(rows: tuple[Tensor, ...], weight: Tensor, bias: Tensor, added: Tensor | None, out: Tensor) -> None:
    """Write what :func:`linear` returns into ``out``; tokens without a norm before come alone."""
    x, *moments = rows
    scale, shift = moments or (None, None)
    _quack_linear(x, weight, bias, scale, shift, added, out)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x weight``."""
    out = x.new_empty(len(x), weight.shape[1])
    _quack_linear(x, weight, None, None, None, None, out)
    return out


def write_rotated(rows: tuple[Tensor, ...], weight: Tensor, bias: Tensor, table: Tensor, out: Tensor) -> None:
    """Write rotated heads behind a norm, for head dims of :data:`ROTATED_DIMS`."""
    x, scale, shift = rows
    operands = _norm_operands(weight, scale, shift) | {"bias": bias[None], "table": table.flatten(1)}
    _with_norm_and_rotation(x, weight.T, out={"D": out}, config=CONFIG, **operands)


def _norm_operands(weight: Tensor, scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
    return {"scale": scale[None], "shift": shift[None], "sums": weight.sum(1, dtype=torch.float32)[None]}


FUNCTIONS = normed, linear, write_linear, matmul, write_rotated, ROTATED_DIMS
