"""The gradient of a LayerNorm without weights, added to the residual path's, and sums of both."""

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

    The last two terms take out the directions to which ``y`` is blind: a shift and a scaling of the row.

    Args:
        dy: the gradient of ``y``, ``(n, E)``.
        x: ``(n, E)``, in the dtype of ``dy``.
        residual_grad: the gradient that reaches ``x`` on the residual path; it may be ``dx`` itself, or None.
        eps: of the norm.
        sums: whether to sum the rows of ``dx`` and of ``residual_grad``, which are gradients of biases.
        normed: whether to return ``LayerNorm(x)``.
        dx: where the result is written.
        delta: ``(n, H)`` float32, where ``rowsum(dx ∘ x)`` of each head is written; or None. Where ``x`` is the
            attention's output, that is the ``delta`` of its backward.

    Returns:
        With ``sums``, the sums over the rows of ``dx`` and of ``residual_grad``: ``(2, E)``, float32 or float64. With
        ``normed``, ``LayerNorm(x)``. An empty tensor in place of what was not asked for.
    """
    y, backward, *_ = torch.func.vjp(lambda x: F.layer_norm(x, x.shape[-1:], eps=eps), x)
    (gradient,) = backward(dy)  # J_LNᵀ dy
    # x reaches the loss through y and on the residual path, and gradients of paths add.
    total = gradient if residual_grad is None else gradient + residual_grad
    parts = [total, torch.zeros_like(total) if residual_grad is None else residual_grad] if sums else []
    # A bias added to every row of x has the gradient Σ dx. A bias added at the end of the residual path has the sum of
    # residual_grad. Both sums come before dx is written, as residual_grad may be dx.
    found = [part.sum(0, dtype=wide_dtype(part.dtype)) for part in parts]
    dx.copy_(total)
    if delta is not None:
        # From dx as it was rounded: the attention's backward reads these numbers as dO.
        delta.copy_(torch.unflatten(dx.to(delta.dtype) * x, 1, (delta.shape[1], -1)).sum(-1))
    return torch.stack(found) if found else x.new_empty(0), y if normed else x.new_empty(0)
