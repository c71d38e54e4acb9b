"""Dtypes, block sizes and processors that kernels and hand-written gradients agree on."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from longnet_dist.caches import bounded_cache

_log = logging.getLogger(__name__)

COMPILE = {"enable_fp_fusion": True}
"""Options of every Triton kernel. From Triton 3.10 on, only those that ask for it get fused multiply-adds."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype for sums over inputs of ``dtype``: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_of(precision: Literal["fp32", "bf16"]) -> torch.dtype:
    """Return the dtype of weights and activations in a precision that a configuration names."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def block_dim(dim: int) -> int:
    """Return the power of two to which the kernels of a GPU pad a head dim."""
    return max(16, 1 << (dim - 1).bit_length())


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU, over which kernels that loop over rows are spread; elsewhere a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@bounded_cache(maxsize=64)
def log_once(message: str) -> None:
    """Log a warning, the first time that it is given."""
    _log.warning(message)
