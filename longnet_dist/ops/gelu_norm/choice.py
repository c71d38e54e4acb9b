"""The choice between torch and a GPU kernel for ``LayerNorm(gelu(h))``, the middle of a feed-forward network."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longnet_dist.attention.kernels.registry import takes_triton
from longnet_dist.ops.gelu_norm.reference import gelu_norm, gelu_norm_gradients


class GeluNorm(NamedTuple):
    """Hold the forward and the gradients of ``LayerNorm(gelu(h))``, as torch functions or as GPU kernels."""

    forward: Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]
    gradients: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, length: int) -> GeluNorm:
        """Return the kernels of ``triton.py`` where they run: on a GPU with Triton, for most lengths."""
        if takes_triton(device, dtype):
            from longnet_dist.ops.gelu_norm import triton as kernels

            if kernels.fits(length):
                return cls(kernels.gelu_norm, kernels.gelu_norm_gradients)
        return PLAIN


PLAIN = GeluNorm(gelu_norm, gelu_norm_gradients)
