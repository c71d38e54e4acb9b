"""Functions of tensors that stay in place, replayed as CUDA graphs: one alone, and one with its gradients."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longnet_dist.numerics import differentiable_once

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
        _rehearse(self._warm_up, self._device)
        graph = torch.cuda.CUDAGraph()
        with _nothing_collected(), torch.cuda.graph(graph):  # records the kernels, which do not run
            self._result = self._function()
        self._graph = graph


class DifferentiableGraph:
    """Replay a scalar function of tensors, and its gradients by parameters, as two CUDA graphs.

    A call copies its inputs into the tensors that the graphs read, and the gradients out of those that they write, so
    what it returned stays as it is in later calls. The parameters must stay where they are in memory. On a CPU each
    call runs the function, and its backward.

    Args:
        function: of as many tensors as ``inputs``; it returns a scalar, and must do the same in every call, as that of
            :class:`Graph`. Tensors that it reads besides inputs and parameters must be kept alive by the caller.
        inputs: examples of its inputs, none of which has a gradient.
        parameters: by which it is differentiated; None takes the place of the gradient by one that it does not use.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        self._function, self._inputs, self._parameters = function, [x.clone() for x in inputs], tuple(parameters)
        self._device, self._calls = self._inputs[0].device, 0
        self._result: Tensor | None = None
        self._dresult: Tensor | None = None
        self._gradients: tuple[Tensor | None, ...] = ()
        self._graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None
        if self._device.type == "cuda":
            self._capture()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the scalar, through which one backward gives the gradients, until the next call."""
        result: Tensor = _Replay.apply(self, inputs, *self._parameters)  # type: ignore[no-untyped-call]
        return result

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, int]:
        """Return a copy of the result, and the number of this call."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        if self._graphs is None:
            with torch.enable_grad():
                self._result = self._function(*self._inputs)
        else:
            self._graphs[0].replay()
        assert self._result is not None
        self._calls += 1
        return self._result.detach().clone(), self._calls

    def backward(self, dresult: Tensor, call: int) -> list[Tensor | None]:
        """Return copies of the gradients for the gradient of the result of a call, which must be the last one.

        Raises:
            RuntimeError: the function was called since.
        """
        if call != self._calls:
            raise RuntimeError("the tensors for this backward were overwritten by a later call; call backward first")
        if self._graphs is None:
            assert self._result is not None
            return list(self._gradients_of(self._result, dresult))
        assert self._dresult is not None
        self._dresult.copy_(dresult)
        self._graphs[1].replay()
        return [None if gradient is None else gradient.clone() for gradient in self._gradients]

    def _capture(self) -> None:
        with torch.enable_grad():
            _rehearse(lambda: self._gradients_of(self._function(*self._inputs), None), self._device)
            forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            # Other threads go on meanwhile: one pins the batch of the next step.
            mode = "thread_local"
            with _nothing_collected():
                with torch.cuda.graph(forward, capture_error_mode=mode):
                    result = self._function(*self._inputs)
                self._dresult = torch.ones_like(result)
                with torch.cuda.graph(backward, pool=forward.pool(), capture_error_mode=mode):
                    self._gradients = self._gradients_of(result, self._dresult)
        self._result, self._graphs = result.detach(), (forward, backward)

    def _gradients_of(self, result: Tensor, dresult: Tensor | None) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(result, self._parameters, dresult, allow_unused=True)


class _Replay(torch.autograd.Function):
    """Give a :class:`DifferentiableGraph` its place in a graph of autograd."""

    @staticmethod
    def forward(ctx: Any, graph: DifferentiableGraph, inputs: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.graph = graph
        result, ctx.call = graph.forward(inputs)
        return result

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dresult: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.graph.backward(dresult, ctx.call)


def _rehearse(work: Callable[[], object], device: torch.device) -> None:
    """Do ``work`` on a stream of its own, as often as a capture needs it."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)


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
