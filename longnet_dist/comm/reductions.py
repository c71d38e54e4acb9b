"""Reductions over all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def total_over_ranks(value: Tensor) -> Tensor:
    """Sum a tensor over all ranks of the world; return the sum in float64, same shape, without gradient.

    It is a collective of the world: every rank must call it.
    """
    total = value.detach().to(torch.float64)
    dist.all_reduce(total)
    return total
