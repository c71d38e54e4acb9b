"""The middle of a feed-forward network, ``LayerNorm(gelu(h))``, and its gradient without a graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gelu_norm(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``LayerNorm(gelu(h)) (rows, F)``; weight and bias ``(F,)`` of the norm, or neither."""
    return F.layer_norm(F.gelu(h), h.shape[-1:], weight, bias, eps)


def gelu_norm_gradients(dy: Tensor, h: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``y`` and ``dh (rows, F)``, and the sum ``(F,)`` of the rows of ``dh``, of a norm without weights.

    They may stand where ``h`` and ``dy`` stood.
    """
    y, backward, *_ = torch.func.vjp(lambda h: gelu_norm(h, None, None, eps), h)
    (dh,) = backward(dy)
    return y, dh, dh.sum(0)
