"""The rows of the next step, read while the device is busy with this one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from longnet_dist.train.step import ReadRows

Rows = tuple[Tensor, Tensor]
"""Tokens and labels of a micro-batch."""


class RowsAhead:
    """Reads a step ahead, in a thread.

    Args:
        read: this rank's rows of all micro-batches of a step, on the CPU.
        device: of this rank; rows for a GPU are pinned, so that no copy waits for it.
    """

    def __init__(self, read: Callable[[int], list[Rows]], device: torch.device) -> None:
        self._read, self._device = read, device
        self._thread = ThreadPoolExecutor(1, "rows ahead")
        self._step, self._rows = -1, Future[list[Rows]]()

    def of(self, step: int, last: bool) -> list[ReadRows]:
        """What gives the rows of ``step``; unless it is the ``last``, those of the next are read from now on."""
        rows = self._rows if step == self._step else self._thread.submit(self._pinned, step)
        found = rows.result()
        if not last:
            self._step, self._rows = step + 1, self._thread.submit(self._pinned, step + 1)
        return [lambda _, rows=part: rows for part in found]  # type: ignore[misc]

    def _pinned(self, step: int) -> list[Rows]:
        rows = self._read(step)
        if self._device.type != "cuda":
            return rows
        with torch.cuda.device(self._device):
            return [(tokens.pin_memory(), labels.pin_memory()) for tokens, labels in rows]
