"""The middle of a feed-forward network, ``LayerNorm(gelu(h))``, and its gradient without a graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gelu_norm(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return ``LayerNorm(gelu(h)) (rows, F)``; weight and bias ``(F,)`` are the norm's, or None."""
    return F.layer_norm(F.gelu(h), h.shape[-1:], weight, bias, eps)


def gelu_norm_gradients(dy: Tensor, h: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return ``y`` and ``dh (rows, F)`` and ``Σ dh (F,)``, for ``y = LayerNorm(gelu(h))`` without weights.

    With ``a = gelu(h)``: :math:`dh = \mathrm{gelu}'(h) ∘ J_{LN}(a)^\top dy`, where
    :math:`\mathrm{gelu}'(h) = Φ(h) + h\,φ(h)` with the normal distribution Φ and its density φ.

    A kernel may overwrite ``h`` and ``dy`` with its results.
    """
    y, backward, *_ = torch.func.vjp(lambda h: gelu_norm(h, None, None, eps), h)
    (dh,) = backward(dy)
    return y, dh, dh.sum(0)
