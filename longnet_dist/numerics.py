"""Dtypes, block sizes and processors that kernels and hand-written gradients agree on."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch

from longnet_dist.caches import bounded_cache
from longnet_dist.errors import ConfigError

_log = logging.getLogger(__name__)

COMPILE = {"enable_fp_fusion": True}
"""Options of every Triton kernel. From Triton 3.10 on, only those that ask for it get fused multiply-adds."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype for sums over inputs of ``dtype``: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_of(precision: Literal["fp32", "bf16"]) -> torch.dtype:
    """Return the dtype of weights and activations in a precision that a configuration names."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def block_dim(dim: int) -> int:
    """Return the power of two to which the kernels of a GPU pad a head dim."""
    return max(16, 1 << (dim - 1).bit_length())


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU, over which kernels that loop over rows are spread; elsewhere a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@bounded_cache(maxsize=64)
def log_once(message: str) -> None:
    """Log a warning, the first time that it is given."""
    _log.warning(message)


Backward = Callable[..., tuple[torch.Tensor | None, ...]]


def differentiable_once(backward: Backward) -> Backward:
    """Decorate a hand-written backward, so that a derivative of its gradients is refused.

    torch's ``once_differentiable`` refuses it only where the incoming gradient has a graph. That of ``out.sum()`` has
    none, and a penalty on the gradient would be left out without a word.
    """

    @functools.wraps(backward)
    def decorated(ctx: Any, *incoming: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.compiler.is_compiling():  # torch's compiler refuses second derivatives itself
            return backward(ctx, *incoming)
        with torch.no_grad():
            gradients = backward(ctx, *incoming)
        if not torch.is_grad_enabled():  # only create_graph=True enables it in a backward
            return gradients
        found: tuple[torch.Tensor | None, ...] = _Last.apply(torch.zeros((), requires_grad=True), *gradients)  # type: ignore[no-untyped-call]
        return found

    return decorated


class _Last(torch.autograd.Function):
    """Pass gradients on; their own derivative is an error."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if gradient is None else gradient.clone() for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *incoming: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        raise ConfigError(
            "a gradient of dilated attention or of its model's loss has no derivative of its own; leave out "
            "create_graph, or for short sequences compute attention_weights(...) @ v, which torch differentiates twice"
        )
