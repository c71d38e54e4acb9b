"""The profiler records a trace of chosen steps and a history of the GPU's memory during them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from longnet_dist.config.schema import ProfileConfig
from longnet_dist.private_interfaces import dump_memory, record_memory

MEMORY_EVENTS = 200_000


class StepProfiler:
    """A StepProfiler profiles the steps that the configuration selects, on every rank.

    It writes ``rankR.trace.json.gz`` (for chrome://tracing, Perfetto, TensorBoard) and on a GPU ``rankR.memory.pickle``
    (for https://docs.pytorch.org/memory_viz).

    Args:
        wanted: the section ``train.profile``; None: profile nothing.
        folder: folder for the files, created when the first one is written.
        device: device of this rank.
    """

    def __init__(self, wanted: ProfileConfig | None, folder: Path, device: torch.device) -> None:
        self._wanted, self._folder, self._device = wanted, folder, device
        self._profile: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wrap step ``number``, counted from 1.

        The files are written after the last selected step, or when a step raises.
        """
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
            record_memory(MEMORY_EVENTS)
        # There is one cycle alone; but torch 2.11 warns unless the events of all are kept.
        self._profile = profile(activities=activities, record_shapes=True, acc_events=True)
        self._profile.start()

    def _write(self, running: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = self._folder / f"rank{dist.get_rank()}"
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            dump_memory(f"{name}.memory.pickle")
            record_memory(None)
        running.stop()
        running.export_chrome_trace(f"{name}.trace.json.gz")
