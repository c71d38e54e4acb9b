"""What ``benchmarks/scaling.py`` measures: dilated attention on a rank, with its exchange or without."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_dist import DilatedPattern, dilated_attention
from longnet_dist.attention.functional import (
    AttentionSpec,
    attention_backward,
    attention_forward,
    start_attention_backward,
)
from longnet_dist.attention.kernels.registry import choose_kernel
from longnet_dist.geometry.exchange_plan import plan_exchange
from longnet_dist.geometry.overlap import first_halves
from longnet_dist.geometry.window import Shards


@dataclass(frozen=True)
class Problem:
    """Causal dilated attention of ``rows`` rows over the first ``gpus`` ranks; a geometric pattern up to all rows.

    ``lean`` computes what fits, as a block of a training step does: dq stays float32, and the gradient of the output,
    of a loss ``½ Σ out²``, is the output itself.
    """

    rows: int
    gpus: int
    heads: int
    dim: int
    base: int
    lean: bool = False

    @property
    def pattern(self) -> DilatedPattern:
        return DilatedPattern.geometric(self.base, self.rows)

    @property
    def shards(self) -> Shards:
        return Shards.even(self.rows, self.gpus)

    def traffic(self, device: torch.device, dtype: torch.dtype) -> dict[str, list[int]]:
        """Bytes that each rank sends and receives in a forward and a backward, for other ranks or for itself."""
        halves = first_halves(self.pattern) if choose_kernel("auto", device, dtype).merges_overlaps else ()
        plans = [plan_exchange(self.pattern, self.shards, rank, self.heads, True, halves) for rank in range(self.gpus)]
        out, back = (2 * self.dim * size for size in (dtype.itemsize, 4))
        counts = [(sum(plan.send_counts), sum(plan.receive_counts)) for plan in plans]
        return {
            "forward_sent_bytes": [out * sent for sent, _ in counts],
            "forward_received_bytes": [out * received for _, received in counts],
            "backward_sent_bytes": [back * received for _, received in counts],
            "backward_received_bytes": [back * sent for sent, _ in counts],
        }

    def inputs(self, rank: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and, unless lean, the gradient of the output, of a rank's rows, ``(1, n, H, D)``."""
        start, stop = self.shards.window(rank)
        shape = (1, stop - start, self.heads, self.dim)
        wanted = (False,) * 3 if self.lean else (True, True, True, False)
        return [torch.randn(shape, device=device, dtype=dtype).requires_grad_(needed) for needed in wanted]

    def attend(self, inputs: list[Tensor], group: dist.ProcessGroup | None, overlap: bool = True) -> list[Tensor]:
        """One forward and backward: out, dq, dk, dv."""
        if self.lean:
            return self._attend_lean(inputs[0], inputs[1], inputs[2], group, overlap)
        q, k, v, dout = inputs
        out = dilated_attention(q, k, v, self.pattern, group=group, overlap=overlap, total_rows=self.rows)
        assert isinstance(out, Tensor)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    def _attend_lean(
        self, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None, overlap: bool
    ) -> list[Tensor]:
        spec = AttentionSpec.of(q, k, v, self.pattern, True, None, group, "auto", False, overlap, self.rows, cache=None)
        out, lse, shared = attention_forward(q, k, v, spec)
        start = start_attention_backward(out, out, lse, spec, narrow=False)
        return [out, *attention_backward(start, q, k, v, shared, spec)]


@contextmanager
def stubbed_exchange() -> Iterator[None]:
    """Let the exchange take what this rank has, in the same shape, instead of what others send."""

    class Done:
        def wait(self) -> None:
            pass

    def copy(received: Tensor, sent: Tensor, *_: Any, **__: Any) -> Done:
        rows = min(len(received), len(sent))
        received[:rows].copy_(sent[:rows])
        received[rows:].zero_()
        return Done()

    with mock.patch.object(dist, "all_to_all_single", copy):
        yield


def difference_from_one_rank(
    problem: Problem, group: dist.ProcessGroup, rank: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Norm of the difference between this rank's rows and those of the same computed alone, relative to the latter."""
    torch.manual_seed(0)
    alone = Problem(problem.rows, 1, problem.heads, problem.dim, problem.base)
    whole = alone.inputs(0, device, dtype)
    rows = slice(*problem.shards.window(rank))
    part = [x.detach()[:, rows].contiguous().requires_grad_(x.requires_grad) for x in whole]
    pairs = zip(problem.attend(part, group), alone.attend(whole, None), strict=True)
    names = ("out", "dq", "dk", "dv")
    return {
        name: float((a.float() - b[:, rows].float()).norm() / b[:, rows].float().norm())
        for name, (a, b) in zip(names, pairs, strict=True)
    }


def profile_exchange(run: Callable[[], Any], path: Path, repeats: int = 3) -> dict[str, dict[str, float]]:
    """Profile ``run`` on a GPU, write the trace, and say how much of the transfers it shows hidden."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return hidden_shares(path)


def hidden_shares(path: Path) -> dict[str, dict[str, float]]:
    """Of every kind of NCCL kernel in a profiler's trace: microseconds in all, and the share beside other kernels.

    The exchange is ``SendRecv``; a trace of training (``train.profile``) also has the kinds of ZeRO.
    """
    with gzip.open(path) as file:
        kernels = [event for event in json.load(file)["traceEvents"] if event.get("cat") == "kernel"]
    transfers: dict[str, list[tuple[float, float]]] = {}
    others = []
    for kernel in kernels:
        span = (kernel["ts"], kernel["ts"] + kernel["dur"])
        if kind := re.match(r"ncclDevKernel_([A-Za-z]+)", kernel["name"]):
            transfers.setdefault(kind[1], []).append(span)
        else:
            others.append(span)
    if not transfers:
        raise RuntimeError(f"no kernel of NCCL is among the {len(kernels)} of {path}")
    found = {}
    for name, spans in transfers.items():
        hidden = covered(spans) + covered(others) - covered(spans + others)
        found[name] = {"microseconds": covered(spans), "hidden_share": hidden / covered(spans)}
    return found


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    length, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        length += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return length
