"""One training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_dist.attention.stream import Stream
from longnet_dist.data.batches import IGNORE_INDEX
from longnet_dist.errors import LongNetError
from longnet_dist.geometry.window import Shards
from longnet_dist.train.engine import optimizer_step, set_learning_rate

ReadRows = Callable[[tuple[int, int]], tuple[Tensor, Tensor]]
"""Global rows ``[start, stop)`` of a micro-batch: tokens and labels, each (b, stop − start) int64, on the CPU"""


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
    engine: Any, micro_batches: Sequence[ReadRows], sequence_length: int, chunk_length: int, learning_rate: float
) -> StepResult:
    """Forward, backward and update, over all micro-batches of a step. Every rank of the world must call.

    A sequence passes in chunks: all but the last leave their sparse rows in a first pass without graph, then each is
    computed and differentiated, the last one first. A sequence of one chunk is thus computed once.

    The loss of a step is the sum over all labelled rows of all ranks and micro-batches, divided by their number.
    DeepSpeed, which sees a micro-batch in every chunk, divides gradients by ``world · passes``; multiplying the local
    sum by that gives exactly this mean, however the labels are spread over ranks.

    Args:
        engine: set up to accumulate over the chunks of all micro-batches.
        micro_batches: read the rows of this rank's sequences.
        sequence_length: rows ``N`` of a sequence, all sequence ranks together.
        chunk_length: rows of a chunk, all sequence ranks together.
        learning_rate: of this step.

    Raises:
        LongNetError: loss or gradient is not finite (on all ranks alike).
    """
    set_learning_rate(engine, learning_rate)
    stream: Stream = engine.module.stream(sequence_length)
    windows = [shards.window(stream.rank) for shards in stream.chunks(chunk_length)]
    counts = [(read(window)[1] != IGNORE_INDEX).sum() for read in micro_batches for window in windows]
    num_labels = total_over_ranks(torch.stack(counts).sum().to(engine.device))
    scale = dist.get_world_size() * len(counts) / num_labels.clamp(min=1)

    loss_sum, grad_norm = torch.zeros((), dtype=torch.float64, device=engine.device), None
    for read in micro_batches:
        stream = engine.module.stream(sequence_length)
        with torch.no_grad():
            for shards in stream.record(chunk_length):
                _forward(engine, read, stream, shards)
        for shards in stream.replay(chunk_length):
            chunk_loss = _forward(engine, read, stream, shards).loss_sum
            engine.backward(chunk_loss * scale)
            grad_norm = optimizer_step(engine)
            loss_sum += chunk_loss.detach()

    loss = float(total_over_ranks(loss_sum) / num_labels)
    if grad_norm is None or not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise LongNetError(
            f"training diverged: the loss is {loss} and the gradient's norm {grad_norm}; "
            "resume from the last checkpoint with a smaller train.learning_rate or train.clip_norm"
        )
    return StepResult(loss, grad_norm)


def _forward(engine: Any, read: ReadRows, stream: Stream, shards: Shards) -> Any:
    """The model's output for this rank's rows of the present chunk."""
    tokens, labels = (part.to(engine.device) for part in read(shards.window(stream.rank)))
    return engine(tokens, labels, stream=stream)


def total_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks of the world, in float64."""
    total = value.detach().to(torch.float64)
    dist.all_reduce(total)
    return total
