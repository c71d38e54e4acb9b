"""The cross-entropy of a linear layer's outputs, computed in chunks so that the logits never exist whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from longnet_dist.numerics import wide_dtype
from longnet_dist.ops.compiled import run

IGNORE_INDEX = -100


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, chunk: int, compile: bool = False) -> Tensor:
    """Sum of the cross-entropies of ``softmax(x weightᵀ)``; ``chunk`` rows of logits exist at a time.

    Softmax, the loss and the sum of the chunks' gradients of ``weight`` are float32 (float64 for float64 inputs). With
    a graph, forward makes the gradients too, while it has the logits; backward multiplies them.

    Args:
        x: ``(rows, E)``.
        weight: ``(V, E)``, in the dtype of ``x``.
        labels: ``(rows,)`` int64 in ``0 … V-1``, or :data:`IGNORE_INDEX` for a row without label.
        chunk: rows, at least 1.
        compile: whether what happens to a chunk of logits is compiled.

    Returns:
        Scalar, float32 or float64.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        loss: Tensor = _LinearCrossEntropy.apply(x, weight, labels, chunk, compile)  # type: ignore[no-untyped-call]
        return loss
    loss, factor = torch.zeros((), dtype=wide_dtype(x.dtype), device=x.device), _aligned(weight)
    for rows in _chunks(len(x), chunk):
        loss += run(_loss_of, compile, x[rows], factor, labels[rows], len(weight))
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, chunk: int, compile: bool) -> Tensor:
        x, weight, vocab = x.detach(), _aligned(weight.detach()), len(weight)
        loss = torch.zeros((), dtype=wide_dtype(x.dtype), device=x.device)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide_dtype(x.dtype))
        for rows in _chunks(len(x), chunk):
            loss += run(_write_gradients, compile, x[rows], weight, labels[rows], vocab, dx[rows], dweight)
        ctx.save_for_backward(dx, dweight[:vocab])
        ctx.chunk, ctx.compile = chunk, compile
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        gradient, dweight = ctx.saved_tensors
        dx = torch.empty_like(gradient)
        for rows in _chunks(len(dx), ctx.chunk):
            run(_write_scaled, ctx.compile, gradient[rows], dloss, dx[rows])
        return dx, (dweight * dloss).to(dx.dtype), None, None, None


def _aligned(weight: Tensor) -> Tensor:
    """With rows of zeros behind it, so that rows of logits begin where products are fast."""
    missing = -len(weight) % _alignment(weight.device)
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


def _alignment(device: torch.device) -> int:
    """Rows of logits hold a multiple of it."""
    return 64 if device.type == "cuda" else 1


def _loss_of(x: Tensor, weight: Tensor, labels: Tensor, vocab: int) -> Tensor:
    loss, _, _ = _softmax(F.linear(x, weight), labels, vocab)
    return loss


def _write_gradients(x: Tensor, weight: Tensor, labels: Tensor, vocab: int, dx: Tensor, dweight: Tensor) -> Tensor:
    """The loss of some rows; write its gradient, add that of the weight."""
    loss, exponentials, total = _softmax(F.linear(x, weight), labels, vocab)
    right = torch.arange(len(weight), device=x.device) == labels.unsqueeze(1)
    labelled = (labels != IGNORE_INDEX).unsqueeze(1)
    dlogits = exponentials.div_(total).add_(right, alpha=-1).mul_(labelled).to(x.dtype)
    dx.copy_(dlogits @ weight)
    dweight.add_(dlogits.T @ x)
    return loss


def _write_scaled(gradient: Tensor, dloss: Tensor, dx: Tensor) -> None:
    """The gradient of a loss that counts ``dloss`` times."""
    dx.copy_(gradient * dloss)


def _softmax(logits: Tensor, labels: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses of the labelled rows; numerators, as ``logits``, and denominators ``(rows, 1)`` of the softmax.

    The first ``vocab`` logits of a row count. torch's cross-entropy would make the logarithms of all probabilities, to
    read one a row.
    """
    wide, labelled = logits.to(wide_dtype(logits.dtype)), labels != IGNORE_INDEX
    label = torch.where(labelled, labels, 0).unsqueeze(1)
    of_label = wide[:, :vocab].gather(1, label)
    if wide.shape[1] > vocab:
        wide = wide.masked_fill(torch.arange(wide.shape[1], device=wide.device) >= vocab, -torch.inf)
    largest = wide.amax(-1, keepdim=True)
    exponentials = (wide - largest).exp_()
    total = exponentials.sum(-1, keepdim=True)
    losses = (total.log() + largest - of_label).squeeze(1)
    return torch.where(labelled, losses, 0.0).sum(), exponentials, total


def _chunks(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(first, min(first + chunk, rows)) for first in range(0, rows, chunk))
