"""How long a rank waits in collectives, which tells the time of its own work from that of the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Self

import torch
import torch.distributed as dist

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "reduce_scatter_tensor",
)


class CollectiveWaits:
    """Time the collectives of ``torch.distributed`` that this process waits for, in chosen stretches of a run.

    Ranks take the same time for a step, since each waits for the slowest. What a rank does not wait, it works. The
    functions are replaced while the context is entered, so they must be looked up there. Outside of
    :meth:`measuring` they do what they did. On a GPU, events on the current stream take the times, and the host does
    not wait for them.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu, self._is_on = device.type == "cuda", False
        self._pairs: list[tuple[Any, Any]] = []
        self._replaced: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> Self:
        for name in COLLECTIVES:
            self._replaced[name] = getattr(dist, name)
            setattr(dist, name, self._timed(self._replaced[name]))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._replaced.items():
            setattr(dist, name, function)

    @contextmanager
    def measuring(self, is_on: bool = True) -> Iterator[None]:
        """Measure inside of the context; what was measured before is forgotten."""
        self._pairs, self._is_on = [], is_on
        try:
            yield
        finally:
            self._is_on = False

    @property
    def seconds(self) -> float:
        """Return the seconds of all waits that were measured; on a GPU they must be over."""
        if self._is_gpu:
            return float(sum(begin.elapsed_time(end) for begin, end in self._pairs)) / 1000
        return float(sum(end - begin for begin, end in self._pairs))

    def waiting(self, wait: Callable[[], Any]) -> Any:
        """Return what ``wait`` returns, and note its time."""
        begin = self._now()
        result = wait()
        self._pairs.append((begin, self._now()))
        return result

    def _now(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if not self._is_on:
                return function(*args, **options)
            if options.get("async_op"):
                work = function(*args, **options)
                return None if work is None else _TimedWork(work, self)
            return self.waiting(lambda: function(*args, **options))

        return call


class _TimedWork:
    """A collective under way, whose wait is timed."""

    def __init__(self, work: Any, waits: CollectiveWaits) -> None:
        self._work, self._waits = work, waits

    def wait(self, *args: Any, **options: Any) -> Any:
        return self._waits.waiting(lambda: self._work.wait(*args, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
