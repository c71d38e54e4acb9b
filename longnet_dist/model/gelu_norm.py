"""The middle of a feed-forward network, ``LayerNorm(gelu(h))``, and its gradient without a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longnet_dist.kernels.choice import takes_triton


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


class GeluNorm(NamedTuple):
    """The two functions, from torch or as kernels of our own."""

    forward: Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]
    gradients: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, length: int) -> GeluNorm:
        """The kernels of ``longnet_dist/kernels/gelu_norm.py`` where they run: on a GPU with Triton, most lengths."""
        if takes_triton(device, dtype):
            from longnet_dist.kernels import gelu_norm as kernels

            if kernels.fits(length):
                return cls(kernels.gelu_norm, kernels.gelu_norm_gradients)
        return PLAIN


PLAIN = GeluNorm(gelu_norm, gelu_norm_gradients)
