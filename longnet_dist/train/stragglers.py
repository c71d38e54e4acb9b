"""The rank that the others wait for is found while a run trains, and its host named."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch.distributed as dist

from longnet_dist.comm.waits import CollectiveWaits

EVERY = 10  # steps from one that is measured to the next; the first ones compile and warm up
SAMPLES = 5  # measured steps of which a rank's median is taken
BEHIND = 1.05  # times the median of the others, from which a rank is named


class Pace(NamedTuple):
    """Tell how the ranks keep up; the fields are those of :class:`~longnet_dist.telemetry.metrics.StepMetrics`."""

    slowest_rank: int
    slowest_rank_seconds: float
    median_rank_seconds: float


class Stragglers:
    """Measure each rank's own time of a step now and then, and name the slowest rank's host if it is 5 % behind.

    A rank's own time is that of a step without its waits in collectives. It travels with the sum that ends the next
    step, so no further collective is needed.

    Args:
        waits: of this rank's collectives.
    """

    def __init__(self, waits: CollectiveWaits) -> None:
        self._waits, self._rank, self._ranks = waits, dist.get_rank(), dist.get_world_size()
        self._steps, self._own = 0, 0.0
        self._named: set[int] = set()  # since a step in which no rank was behind
        self._recent: deque[Sequence[float]] = deque(maxlen=SAMPLES)
        self._hosts = [""] * self._ranks
        if self._ranks > 1:
            dist.all_gather_object(self._hosts, socket.gethostname())

    @contextmanager
    def step(self) -> Iterator[None]:
        """Do a step inside of the context; on all ranks the same steps are measured."""
        self._steps += 1
        with self._waits.measuring(self._ranks > 1 and self._steps % EVERY == 0):
            yield

    def report(self) -> list[float]:
        """Return what this rank adds to the sum over ranks of the present step: one number for each rank, or none."""
        if self._ranks == 1 or self._steps <= EVERY or self._steps % EVERY != 1:
            return []
        return [self._own if rank == self._rank else 0.0 for rank in range(self._ranks)]

    def add(self, seconds: float, reports: Sequence[float]) -> tuple[Pace | None, str]:
        """Take the time of a step that was done; return the pace of the ranks, and a message if one is behind.

        Args:
            seconds: of the step on this rank, waits included.
            reports: the sum of the reports of all ranks in this step.
        """
        if self._steps % EVERY == 0:
            self._own = max(0.0, seconds - self._waits.seconds)
        if not reports:
            return None, ""
        self._recent.append(reports)
        times = [median(own) for own in zip(*self._recent, strict=True)]
        slowest = max(range(self._ranks), key=times.__getitem__)
        others = median(time for rank, time in enumerate(times) if rank != slowest)
        pace = Pace(slowest, times[slowest], others)
        is_behind = len(self._recent) == SAMPLES and times[slowest] > BEHIND * others
        if not is_behind:
            self._named.clear()
        if not is_behind or slowest in self._named:
            return pace, ""
        self._named.add(slowest)
        return pace, (
            f"rank {slowest} on host {self._hosts[slowest]} is slow: it works {times[slowest]:.3g} s of a step, "
            f"{times[slowest] / others - 1 if others else 1:.0%} more than the median of the others, {others:.3g} s; "
            "compare the hosts with longnet doctor under the same launcher"
        )
