"""The choice between torch and a GPU kernel for the gradient of a LayerNorm without weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longnet_dist.attention.kernels.registry import takes_triton
from longnet_dist.ops.norm_gradients.reference import norm_gradients

NormGradients = Callable[
    [Tensor, Tensor, Tensor | None, float, bool, bool, Tensor, Tensor | None], tuple[Tensor, Tensor]
]


def norm_gradients_of(device: torch.device, dtype: torch.dtype, length: int) -> NormGradients:
    """Return the kernel of ``triton.py`` where it runs: on a GPU with Triton, for most lengths."""
    if takes_triton(device, dtype):
        from longnet_dist.ops.norm_gradients import triton as kernels

        if kernels.fits(length):
            return kernels.norm_gradients
    return norm_gradients


def gives_delta(device: torch.device, dtype: torch.dtype, length: int, heads: int) -> bool:
    """Return whether that kernel runs and also computes ``delta``, the attention backward's ``rowsum(dO ∘ O)``."""
    if not takes_triton(device, dtype):
        return False
    from longnet_dist.ops.norm_gradients import triton as kernels

    return kernels.fits_heads(length, heads)
