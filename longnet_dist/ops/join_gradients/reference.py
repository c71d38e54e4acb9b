"""Gradients of queries, keys and values side by side, so that one matmul takes all three."""

from __future__ import annotations

import torch
from torch import Tensor

from longnet_dist.attention.positions import RotaryTable, rotate
from longnet_dist.numerics import wide_dtype


def join_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, table: RotaryTable | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return ``g = [Rᵀdq, Rᵀdk, dv] (n, (H + 2·Hkv)·D)`` in ``dtype``, and the sum of its rows.

    The three projections are one linear layer, ``[q', k', v] = u [W_q; W_k; W_v]ᵀ + b``. The attention takes
    ``q = R q'`` and ``k = R k'`` with a linear map ``R`` for each token. So ``g`` is the gradient of the layer's
    output, and its sum over the rows is ``db``.

    Args:
        dq: ``(n, H, D)``, the gradient of ``q``.
        dk, dv: ``(n, Hkv, D)``.
        table: the maps ``R``; None without positions.
        dtype: of ``g``; the sum is float32, or float64 for float64.
    """
    if table is not None:
        # q = R q'  ⇒  dq' = Rᵀ dq. R rotates pairs of channels; with xPos it also scales them, as Rᵀ does.
        dq, dk = rotate(dq, dk, table.transposed())
    joined = torch.cat([gradient.to(dtype).flatten(1) for gradient in (dq, dk, dv)], 1)
    return joined, joined.sum(0, dtype=wide_dtype(dtype))
