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
from longnet_dist.comm.reductions import total_over_ranks
from longnet_dist.geometry.documents import Documents
from longnet_dist.geometry.window import Shards
from longnet_dist.train.deepspeed_engine import optimizer_step, set_learning_rate

Rows = tuple[Tensor, ...]
"""What the model is called with, on the CPU: tokens and labels of a micro-batch, each (b, n) int64; or features"""
ReadRows = Callable[[tuple[int, int]], Rows]
"""Global rows ``[start, stop)`` of a micro-batch"""


@dataclass(frozen=True)
class MicroBatch:
    """Hold the rows of a micro-batch that this rank may ask for.

    Attributes:
        read: reads rows ``[start, stop)``.
        num_labels: says how many labels rows ``[start, stop)`` have. The loss is divided by the number of all labels of
            a step, which must be known before the first row is read.
        documents: the documents of its sequence; None: it is one.
        rows: rows ``N`` of its sequence, where micro-batches have unequal ones; None: those of the step.
        seed: of what is random in its forward, such as dropout; None: nothing is.
    """

    read: ReadRows
    num_labels: Callable[[tuple[int, int]], int]
    documents: Documents | None = None
    rows: int | None = None
    seed: int | None = None

    def lengths(self, sequence_length: int, chunk_length: int) -> tuple[int, int]:
        """Return the rows of its sequence and of a chunk, where those of the step are given."""
        return (sequence_length, chunk_length) if self.rows is None else (self.rows, self.rows)


@dataclass(frozen=True)
class StepResult:
    """Hold the results of a step, the same on every rank.

    Attributes:
        loss: mean loss over all labelled rows of all ranks; of text the cross-entropy, nats.
        grad_norm: norm of the gradient of ``loss``, before clipping.
        stop: whether a rank has been asked to stop.
        spike: whether the update was refused as a spike.
        reports: sum over ranks of the numbers that each rank reported.
    """

    loss: float
    grad_norm: float
    stop: bool
    spike: bool = False
    reports: tuple[float, ...] = ()

    @property
    def skipped(self) -> bool:
        """Say whether the step changed nothing, because loss or gradient was not finite or a spike."""
        return self.spike or not math.isfinite(self.grad_norm)


def train_step(
    engine: Any,
    micro_batches: Sequence[MicroBatch],
    sequence_length: int,
    chunk_length: int,
    learning_rate: float,
    stop_requested: Callable[[], bool] = lambda: False,
    is_spike: Callable[[float, float], bool] | None = None,
    report: Sequence[float] = (),
) -> StepResult:
    """Forward, backward and update, over all micro-batches of a step. Every rank of the world must call.

    A sequence passes in chunks: all but the last leave their sparse rows in a first pass without graph, then each is
    computed and differentiated, the last one first. A sequence of one chunk is thus computed once.

    The loss of a step is the sum over all labelled rows of all ranks and micro-batches, divided by their number.
    DeepSpeed, which sees a micro-batch in every chunk, divides gradients by ``world · passes``; multiplying the local
    sum by that gives exactly this mean, however the labels are spread over ranks.

    A loss that is not finite makes the whole gradient so, on all ranks, and such a step changes nothing: neither
    weights nor the optimizer's states.

    Args:
        engine: set up to accumulate over the chunks of all micro-batches.
        micro_batches: of this rank's sequences.
        sequence_length: rows ``N`` of a sequence, all sequence ranks together. With packed documents the samples of a
            micro-batch are one sequence.
        chunk_length: rows of a chunk, all sequence ranks together.
        learning_rate: of this step.
        stop_requested: whether this rank has been asked to stop; the ranks agree on it at the end of the step.
        is_spike: says of a step's loss and gradient norm whether it is a spike, which changes nothing then. If one rank
            says so, all skip the step.
        report: numbers to sum over ranks with the loss, as many on each rank.
    """
    set_learning_rate(engine, learning_rate)
    windows: dict[tuple[int, int], list[tuple[int, int]]] = {}  # of the chunks of a sequence, by its lengths
    counts: list[int] = []
    for micro_batch in micro_batches:
        lengths = micro_batch.lengths(sequence_length, chunk_length)
        if lengths not in windows:
            rows, chunk = lengths
            stream: Stream = engine.module.stream(rows)
            windows[lengths] = [shards.window(stream.rank) for shards in stream.chunks(chunk)]
        counts += map(micro_batch.num_labels, windows[lengths])
    num_labels = total_over_ranks(torch.tensor(sum(counts), device=engine.device))
    scale = dist.get_world_size() * len(counts) / num_labels.clamp(min=1)

    def refuse(norm: float) -> bool:
        """Say whether the update is refused; every rank must call."""
        assert is_spike is not None
        loss = float(total_over_ranks(loss_sum)) / max(1.0, float(num_labels))
        spikes.append(float(total_over_ranks(loss_sum.new_tensor(float(is_spike(loss, norm))))) > 0)
        return spikes[-1]

    spikes: list[bool] = []
    loss_sum, grad_norm = torch.zeros((), dtype=torch.float64, device=engine.device), None
    for micro_batch in micro_batches:
        rows, chunk = micro_batch.lengths(sequence_length, chunk_length)
        stream = engine.module.stream(rows, cu_seqlens=micro_batch.documents)
        if micro_batch.seed is not None:
            torch.manual_seed(micro_batch.seed)
        with torch.no_grad():
            for shards in stream.record(chunk):
                _forward(engine, micro_batch.read, stream, shards)
        for shards in stream.replay(chunk):
            chunk_loss = _forward(engine, micro_batch.read, stream, shards).loss_sum
            # A loss that is not finite may have a finite gradient; the factor is NaN then, and else 1.
            engine.backward(chunk_loss * scale * (1 + 0 * chunk_loss.detach()))
            loss_sum += chunk_loss.detach()
            grad_norm = optimizer_step(engine, refuse if is_spike else None)

    assert grad_norm is not None
    shared = torch.cat([loss_sum[None], loss_sum.new_tensor([float(stop_requested()), *report])])
    total, num_stops, *reports = total_over_ranks(shared).tolist()
    return StepResult(total / max(1.0, float(num_labels)), grad_norm, num_stops > 0, any(spikes), tuple(reports))


def _forward(engine: Any, read: ReadRows, stream: Stream, shards: Shards) -> Any:
    """The model's output for this rank's rows of the present chunk."""
    return engine(*(_to(engine.device, part) for part in read(shards.window(stream.rank))), stream=stream)


def _to(device: torch.device, tensor: Tensor) -> Tensor:
    """On the device; from pinned memory, so that the host does not wait for what the device still has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
