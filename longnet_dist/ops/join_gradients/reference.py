"""Gradients of queries, keys and values side by side, as one factor of the products behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from longnet_dist.attention.positions import RotaryTable, rotate
from longnet_dist.numerics import wide_dtype


def join_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, table: RotaryTable | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return ``g = [Rᵀdq, Rᵀdk, dv] (n, (H + 2·Hkv)·D)`` in ``dtype``, and the sum of its rows.

    Args:
        dq: ``(n, H, D)``, the gradient of rotated queries.
        dk, dv: ``(n, Hkv, D)``.
        table: the rotation ``R``, which is undone; None without positions.
        dtype: of the result; the sum is float32, or float64 for float64.
    """
    if table is not None:
        dq, dk = rotate(dq, dk, table.transposed())
    joined = torch.cat([gradient.to(dtype).flatten(1) for gradient in (dq, dk, dv)], 1)
    return joined, joined.sum(0, dtype=wide_dtype(dtype))
