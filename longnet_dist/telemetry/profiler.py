"""A trace of chosen steps, and what the GPU's memory held during them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from longnet_dist.config.schema import ProfileConfig

MEMORY_EVENTS = 200_000


class StepProfiler:
    """Profiles the steps that a run's configuration asks for, on every rank.

    Writes ``rankR.trace.json.gz`` (chrome://tracing, Perfetto, TensorBoard) and, on a GPU, ``rankR.memory.pickle``
    (https://docs.pytorch.org/memory_viz).

    Args:
        wanted: which steps; None for none.
        folder: made when it is needed.
        device: of this rank.
    """

    def __init__(self, wanted: ProfileConfig | None, folder: Path, device: torch.device) -> None:
        self._wanted, self._folder, self._device = wanted, folder, device
        self._profile: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step ``number``, counted from 1; writes after the last one that is wanted, or that fails."""
        if self._wanted is None:
            yield
            return
        if number == self._wanted.first:
            self._start()
        finished = False
        try:
            yield
            finished = True
        finally:
            if self._profile and (not finished or number == self._wanted.last):
                self._write(self._profile)
                self._profile = None

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            # Python's stacks alone: to name the frames of C++ takes minutes.
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=MEMORY_EVENTS)
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()

    def _write(self, running: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = self._folder / f"rank{dist.get_rank()}"
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.memory._dump_snapshot(f"{name}.memory.pickle")  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
        running.stop()
        running.export_chrome_trace(f"{name}.trace.json.gz")
