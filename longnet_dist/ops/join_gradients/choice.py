"""The choice between torch and a GPU kernel that puts the gradients of queries, keys and values side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longnet_dist.attention.kernels.registry import takes_triton
from longnet_dist.attention.positions import RotaryTable
from longnet_dist.ops.join_gradients.reference import join_gradients

JoinGradients = Callable[[Tensor, Tensor, Tensor, RotaryTable | None, torch.dtype], tuple[Tensor, Tensor]]


def join_gradients_of(
    device: torch.device, dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int
) -> JoinGradients:
    """Return the kernel of ``triton.py`` where it runs: on a GPU with Triton, for most heads."""
    if takes_triton(device, dtype):
        from longnet_dist.ops.join_gradients import triton as kernels

        if kernels.fits(head_dim, heads, kv_heads):
            return kernels.join_gradients
    return join_gradients
