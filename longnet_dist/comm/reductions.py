"""Sums over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def total_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks of the world, in float64."""
    total = value.detach().to(torch.float64)
    dist.all_reduce(total)
    return total
