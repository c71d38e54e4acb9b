"""torch's matmuls, in the form of :class:`~longnet_dist.ops.matmul.choice.Matmul`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ROTATED_DIMS: tuple[int, ...] = ()
"""No head dim: queries and keys are rotated after the matmul, not by it."""


def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """Return the normed tokens ``(n, K)`` without moments."""
    return (F.layer_norm(x, x.shape[-1:], weight, bias, eps),)


def linear(tokens: tuple[Tensor, ...], weight: Tensor, bias: Tensor, added: Tensor | None) -> Tensor:
    """Return ``tokens weightᵀ + bias + added``."""
    y = F.linear(tokens[0], weight, bias)
    return y if added is None else added + y


def write_linear(tokens: tuple[Tensor, ...], weight: Tensor, bias: Tensor, added: Tensor | None, out: Tensor) -> None:
    """Write what :func:`linear` returns into ``out``, which may be ``added``."""
    if added is None:
        torch.addmm(bias, tokens[0], weight.T, out=out)
    elif added is out:
        out.add_(linear(tokens, weight, bias, None))
    else:
        out.copy_(linear(tokens, weight, bias, added))


def write_rotated(tokens: tuple[Tensor, ...], weight: Tensor, bias: Tensor, table: Tensor, out: Tensor) -> None:
    """Raise NotImplementedError: there is no head dim in :data:`ROTATED_DIMS`."""
    raise NotImplementedError("torch's matmuls do not rotate")
