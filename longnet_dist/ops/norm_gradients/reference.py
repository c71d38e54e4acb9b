"""The gradient of a LayerNorm without weights, with what is added to it and the sums that follow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from longnet_dist.numerics import wide_dtype


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
    r"""Write ``dx = residual_grad + J_LNᵀ dy``, all ``(n, E)``, for ``y = LayerNorm(x)`` without weights.

    With mean μ and deviation σ of a row, :math:`\hat x = (x - μ)/σ` and averages :math:`\overline{\,\cdot\,}` over it,

    .. math::
        J_{LN}^\top dy = \frac1σ\left(dy - \overline{dy} - \hat x\,\overline{dy ∘ \hat x}\right).

    Args:
        dy, x: ``(n, E)``.
        residual_grad: the gradient that reaches ``x`` on the residual path; it may be ``dx`` itself, or None.
        eps: of the norm.
        sums: whether to sum rows.
        normed: whether to return ``LayerNorm(x)``.
        dx: where the result is written.
        delta: ``(n, H)`` float32 for ``rowsum(dx ∘ x)`` of every head, or None.

    Returns:
        With ``sums``, the sums over the rows of ``dx`` and of ``residual_grad``: ``(2, E)``, float32 or float64. With
        ``normed``, ``LayerNorm(x)``. An empty tensor in place of what was not asked for.
    """
    y, backward, *_ = torch.func.vjp(lambda x: F.layer_norm(x, x.shape[-1:], eps=eps), x)
    (gradient,) = backward(dy)
    total = gradient if residual_grad is None else gradient + residual_grad
    parts = [total, torch.zeros_like(total) if residual_grad is None else residual_grad] if sums else []
    found = [part.sum(0, dtype=wide_dtype(part.dtype)) for part in parts]
    dx.copy_(total)
    if delta is not None:
        delta.copy_(torch.unflatten(dx.to(delta.dtype) * x, 1, (delta.shape[1], -1)).sum(-1))
    return torch.stack(found) if found else x.new_empty(0), y if normed else x.new_empty(0)
