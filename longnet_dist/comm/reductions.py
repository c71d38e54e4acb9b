"""Reductions over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_dist.numerics import differentiable_once


def total_over_ranks(value: Tensor) -> Tensor:
    """Sum a tensor over all ranks of the world; return the sum in float64, same shape, without gradient.

    It is a collective of the world: every rank must call it.
    """
    total = value.detach().to(torch.float64, copy=True)  # the reduction is in place
    dist.all_reduce(total)
    return total


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum a tensor over the ranks of ``group``; all must call, forward and backward.

    Backward sums the gradients over the ranks, which is the gradient of the sum of all ranks' losses. So averages over
    ranks, as DDP and ZeRO take them, are right where every rank computes the whole loss.
    """
    total: Tensor = _SumOverRanks.apply(value, group)  # type: ignore[no-untyped-call]
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = value.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None]:
        dvalue = dtotal.contiguous().clone()
        dist.all_reduce(dvalue, group=ctx.group)
        return dvalue, None
