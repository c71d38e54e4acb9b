"""A function of tensors that stay in place, replayed as a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

WARM_UPS = 3
"""Calls before a capture, in which libraries choose their kernels and make their workspaces."""


class Graph:
    """Replay a function whose every call does the same to the same tensors.

    On a GPU the first call captures the function's kernels, and each call launches all of them at once. The host then
    does the work of one launch. On a CPU each call runs the function, and copies its result into the same tensor, as a
    replay does.

    The function may read and write tensors that live outside it, in place. It must not make decisions by their values,
    nor by numbers of the host that change: a replay knows only the first call.

    Args:
        function: the step; its result is a tensor.
        warm_up: a part of it that may run any number of times before the first call without changing what follows.
        device: of all tensors.
    """

    def __init__(self, function: Callable[[], Tensor], warm_up: Callable[[], object], device: torch.device) -> None:
        self._function, self._warm_up, self._device = function, warm_up, device
        self._result: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Tensor:
        """Return the result, in a tensor that the next call overwrites."""
        if self._device.type != "cuda":
            result = self._function()
            self._result = result if self._result is None else self._result.copy_(result)
            return self._result
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        assert self._result is not None
        self._graph.replay()
        return self._result

    def _capture(self) -> None:
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._warm_up()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with _nothing_collected(), torch.cuda.graph(graph):  # records the kernels, which do not run
            self._result = self._function()
        self._graph = graph


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Collect garbage now and not inside: an older graph that is freed while one is captured makes that fail."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
