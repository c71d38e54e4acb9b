"""The choice between torch and a GPU kernel for linear layers behind a LayerNorm, on few rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longnet_dist.attention.kernels.registry import takes_triton
from longnet_dist.ops.normed_linear.reference import normed_linear

NormedLinear = Callable[..., Tensor]
MOST_ROWS = 32
"""Rows that a program of the kernel takes at once; torch is faster with more (``benchmarks/decode_kernels.py``)."""


def normed_linear_of(device: torch.device, dtype: torch.dtype, rows: int) -> NormedLinear:
    """Return the kernel of ``triton.py`` where it runs: on a GPU with Triton, for few rows."""
    if rows <= MOST_ROWS and takes_triton(device, dtype):
        from longnet_dist.ops.normed_linear import triton as kernels

        return kernels.normed_linear
    return normed_linear
