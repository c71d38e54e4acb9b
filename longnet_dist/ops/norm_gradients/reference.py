"""The gradient of a LayerNorm without weights, with what is added to it and the sums that follow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from longnet_dist.numerics import wide_dtype


def norm_gradients(
    dy: Tensor,
    x: Tensor,
    beside: Tensor | None,
    eps: float,
    sums: bool,
    normed: bool,
    dx: Tensor,
    dots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Write ``dx = beside + dyᵀ ∂LayerNorm(x)/∂x``, all ``(n, E)``.

    ``beside`` may be ``dx`` itself, or left out. Where ``dots (n, H)`` is given, float32,
    the products of ``dx`` and ``x`` of every head are written there, too.

    Returns:
        With ``sums`` those of the rows of ``dx`` and of ``beside``, ``(2, E)``, float32 or float64, and with ``normed``
        ``LayerNorm(x)``; else nothing in its place.
    """
    y, backward, *_ = torch.func.vjp(lambda x: F.layer_norm(x, x.shape[-1:], eps=eps), x)
    (gradient,) = backward(dy)
    total = gradient if beside is None else gradient + beside
    parts = [total, torch.zeros_like(total) if beside is None else beside] if sums else []
    found = [part.sum(0, dtype=wide_dtype(part.dtype)) for part in parts]
    dx.copy_(total)
    if dots is not None:
        dots.copy_(torch.unflatten(dx.to(dots.dtype) * x, 1, (dots.shape[1], -1)).sum(-1))
    return torch.stack(found) if found else x.new_empty(0), y if normed else x.new_empty(0)
