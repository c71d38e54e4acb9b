"""The next step is prepared while the device is busy with this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

from longnet_dist.data.prefetch import read_ahead
from longnet_dist.train.step import Rows

Step = TypeVar("Step")


class StepsAhead(Generic[Step]):
    """Prepare a step ahead, in a thread, as long as the steps come in order.

    Args:
        prepare: returns what a step needs; it is called in the thread.
        steps: number of steps; nothing is prepared beyond the last.
    """

    def __init__(self, prepare: Callable[[int], Step], steps: int) -> None:
        self._prepare, self._steps = prepare, steps
        self._next: int | None = None
        self._prepared: Iterator[tuple[int, Step]] = iter(())

    def of(self, step: int) -> Step:
        """Return what ``step`` needs, and begin to prepare the next step."""
        if step != self._next or step >= self._steps:
            self._prepared = read_ahead(self._prepare, range(step, max(self._steps, step + 1)))
        _, prepared = next(self._prepared)
        self._next = step + 1
        return prepared


def pinned(rows: Rows, device: torch.device) -> Rows:
    """Return rows for a GPU in pinned memory, so that no copy waits for it; others as they are."""
    if device.type != "cuda":
        return rows
    with torch.cuda.device(device):
        return tuple(part.pin_memory() for part in rows)
