"""The choice between torch and a GPU kernel for ``LayerNorm(silu(g) ∘ u)``, the middle of a gated network."""

from __future__ import annotations

import torch

from longnet_dist.attention.kernels.registry import takes_triton
from longnet_dist.ops.gated_norm.reference import gated_norm, gated_norm_gradients
from longnet_dist.ops.gelu_norm.choice import GeluNorm

PLAIN = GeluNorm(gated_norm, gated_norm_gradients)
"""torch's functions, in the form of those that they stand in for: ``h`` is twice as wide."""


def gated_norm_of(device: torch.device, dtype: torch.dtype, length: int) -> GeluNorm:
    """Return the kernels of ``triton.py`` where they run: on a GPU with Triton, for most inner dims ``length``."""
    if takes_triton(device, dtype):
        from longnet_dist.ops.gated_norm import triton as kernels

        if kernels.fits(length):
            return GeluNorm(kernels.gated_norm, kernels.gated_norm_gradients)
    return PLAIN
