"""What ``benchmarks/billion.py`` measures: a streamed forward, a streamed training step, and dense twins of both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.dense import make_dense
from longnet_dist import LongNet, LongNetConfig
from longnet_dist.attention.stream import Stream
from longnet_dist.data.batches import Windows
from longnet_dist.data.prefetch import read_ahead
from longnet_dist.engine.execution import Execution
from longnet_dist.estimate.model_cost import attention_flops, forward_flops
from longnet_dist.geometry.window import Shards


class Job:
    """A forward, or a training step, over one sequence of real text; ready to run again and again.

    Args:
        config: of the model, whose weights are drawn anew, bf16 on a GPU.
        windows: the text; its first window is the sequence.
        chunk: rows that all ranks hold together at once.
        device: of this rank.
        trains: whether it is a training step.
        dense: whether attention is full, on one device.
    """

    def __init__(
        self, config: LongNetConfig, windows: Windows, chunk: int, device: torch.device, trains: bool, dense: bool
    ) -> None:
        torch.manual_seed(0)
        group = dist.group.WORLD if dist.get_world_size() > 1 else None
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = LongNet(config, group=group, execution=_execution(device)).to(device, dtype)
        if dense:
            make_dense(model)
        self.model, self.windows, self.chunk, self.device = model, windows, chunk, device
        self.masters = MasterWeights(model) if trains else None

    def run(self) -> float:
        """Mean loss of all tokens, before the step if it is one."""
        return self._train(self.masters) if self.masters else self._forward()

    def _forward(self) -> float:
        stream = self.model.stream(self.windows.sequence_length)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for tokens, labels in self._visit(stream, stream.chunks(self.chunk), stream.forward(self.chunk)):
                total += self.model(tokens, labels, stream=stream).loss_sum
        return self._mean(total)

    def _train(self, masters: MasterWeights) -> float:
        stream = self.model.stream(self.windows.sequence_length)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        chunks = stream.chunks(self.chunk)
        with torch.no_grad():
            for tokens, labels in self._visit(stream, chunks[:-1], stream.record(self.chunk)):
                self.model(tokens, labels, stream=stream)
        for tokens, labels in self._visit(stream, chunks[::-1], stream.replay(self.chunk)):
            loss_sum = self.model(tokens, labels, stream=stream).loss_sum
            (loss_sum / stream.total_rows).backward()
            masters.take_gradients()
            total += loss_sum.detach()
        masters.step()
        return self._mean(total)

    def _visit(self, stream: Stream, chunks: list[Shards], visits: Iterable[Shards]) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and labels of every chunk while it is the present one; the next is read meanwhile."""

        def read(shards: Shards) -> tuple[Tensor, Tensor]:
            tokens, labels = self.windows.local([0], shards.window(stream.rank))
            return (tokens.pin_memory(), labels.pin_memory()) if self.device.type == "cuda" else (tokens, labels)

        quiet = dist.get_rank() > 0 or len(chunks) < 8
        bar = tqdm(total=stream.total_rows, unit="token", unit_scale=True, disable=quiet, leave=False)
        with bar:
            for shards, (_, (tokens, labels)) in zip(visits, read_ahead(read, chunks), strict=True):
                yield tokens.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
                bar.update(shards.stop - shards.start)

    def _mean(self, total: Tensor) -> float:
        dist.all_reduce(total)
        return total.item() / self.windows.sequence_length


def _execution(device: torch.device) -> Execution:
    """As ``configs/paper.yaml`` trains; tiles are of one size at nearly all lengths, so little is compiled."""
    return Execution("selective", tile=2**16, compile=device.type == "cuda")


class MasterWeights:
    """Float32 copies of a model's weights, float32 sums of the gradients of all chunks and ranks, and AdamW on both."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = list(model.parameters())
        self._masters = [weight.detach().float().clone() for weight in self._weights]
        for master in self._masters:
            master.grad = torch.zeros_like(master)
        self._optimizer = torch.optim.AdamW(self._masters, lr=1e-4, fused=self._masters[0].is_cuda)

    def take_gradients(self) -> None:
        """Add the gradients of the model to the sums, and leave it none."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            assert master.grad is not None
            assert weight.grad is not None
            master.grad += weight.grad
            weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Sum over ranks, step, and give the model its new weights."""
        for master in self._masters:
            assert master.grad is not None
            dist.all_reduce(master.grad)
        self._optimizer.step()
        for weight, master in zip(self._weights, self._masters, strict=True):
            weight.copy_(master)
            assert master.grad is not None
            master.grad.zero_()


def model_flops(config: LongNetConfig, tokens: int, trains: bool, dense: bool) -> int:
    """FLOPs that the mathematics needs: ``planner.model_cost``, or the same with every pair of a query and a key."""
    forward = forward_flops(config, tokens)
    if dense:
        pairs_flops = 4 * config.head_dim * config.heads * (tokens * (tokens + 1) // 2)
        forward += config.layers * pairs_flops - attention_flops(config, tokens)
    return 3 * forward if trains else forward
