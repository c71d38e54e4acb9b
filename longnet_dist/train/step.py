"""One training step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_dist.data.batches import IGNORE_INDEX
from longnet_dist.errors import LongNetError
from longnet_dist.geometry.window import Shards
from longnet_dist.train.engine import optimizer_step, set_learning_rate

MicroBatch = tuple[Tensor, Tensor]
"""tokens and labels, each (b, n) int64, on the model's device"""


@dataclass(frozen=True)
class StepResult:
    """What a step gives, the same on every rank.

    Attributes:
        loss: mean cross-entropy over all labelled rows of all ranks, nats.
        grad_norm: norm of the gradient of ``loss``, before clipping.
    """

    loss: float
    grad_norm: float


def train_step(
    engine: Any, micro_batches: Sequence[MicroBatch], shards: Shards, sequence_rank: int, learning_rate: float
) -> StepResult:
    """Forward, backward and update, over all micro-batches of a step. Every rank of the world must call.

    The loss of a step is the sum over all labelled rows of all ranks and micro-batches, divided by their number.
    DeepSpeed divides gradients by ``world · micro-batches``; multiplying the local sum by that gives exactly this mean,
    however the labels are spread over ranks.

    Raises:
        LongNetError: loss or gradient is not finite (on all ranks alike).
    """
    set_learning_rate(engine, learning_rate)
    num_labels = total_over_ranks(torch.stack([(labels != IGNORE_INDEX).sum() for _, labels in micro_batches]).sum())
    scale = dist.get_world_size() * len(micro_batches) / num_labels.clamp(min=1)

    loss_sum, grad_norm = torch.zeros((), dtype=torch.float64, device=num_labels.device), None
    for tokens, labels in micro_batches:
        output = engine(tokens, labels, start=shards.window(sequence_rank)[0], total_rows=shards.total_rows)
        engine.backward(output.loss_sum * scale)
        grad_norm = optimizer_step(engine)
        loss_sum += output.loss_sum.detach()

    loss = float(total_over_ranks(loss_sum) / num_labels)
    if grad_norm is None or not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise LongNetError(
            f"training diverged: the loss is {loss} and the gradient's norm {grad_norm}; "
            "resume from the last checkpoint with a smaller train.learning_rate or train.clip_norm"
        )
    return StepResult(loss, grad_norm)


def total_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks of the world, in float64."""
    total = value.detach().to(torch.float64)
    dist.all_reduce(total)
    return total
