"""The rows of the next step, read while the device is busy with this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from longnet_dist.data.prefetch import read_ahead
from longnet_dist.train.step import ReadRows, Rows


class RowsAhead:
    """Reads a step ahead, in a thread, as long as the steps come in order.

    Args:
        read: this rank's rows of all micro-batches of a step, on the CPU.
        steps: after which nothing is read ahead.
        device: of this rank; rows for a GPU are pinned, so that no copy waits for it.
    """

    def __init__(self, read: Callable[[int], list[Rows]], steps: int, device: torch.device) -> None:
        self._read, self._steps, self._device = read, steps, device
        self._next: int | None = None
        self._rows: Iterator[tuple[int, list[Rows]]] = iter(())

    def of(self, step: int) -> list[ReadRows]:
        """What gives the rows of ``step``; those of the next are read from now on."""
        if step != self._next or step >= self._steps:
            self._rows = read_ahead(self._pinned, range(step, max(self._steps, step + 1)))
        _, rows = next(self._rows)
        self._next = step + 1
        return [lambda _, rows=part: rows for part in rows]  # type: ignore[misc]

    def _pinned(self, step: int) -> list[Rows]:
        rows = self._read(step)
        if self._device.type != "cuda":
            return rows
        with torch.cuda.device(self._device):
            return [(tokens.pin_memory(), labels.pin_memory()) for tokens, labels in rows]
