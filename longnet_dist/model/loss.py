"""The output projection and a cross-entropy that never holds all logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
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


class LanguageModelHead(nn.Module):
    """Output projection without bias; with labels, the sum of the cross-entropies instead of logits.

    Projection and loss are one module because ZeRO stage 3 gathers a module's parameters around its call only.

    Args:
        dim: model dim ``E``.
        vocab_size: ``V``. Whoever ties ``weight`` to an embedding may give it more rows: these are no outputs.
        chunk: rows of logits that the loss holds at once.
    """

    def __init__(self, dim: int, vocab_size: int, chunk: int) -> None:
        super().__init__()
        self.vocab_size, self.chunk = vocab_size, chunk
        self.weight: Tensor = nn.Parameter(torch.empty(vocab_size, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, x: Tensor, labels: Tensor | None = None, compile: bool = False) -> Tensor:
        """Logits ``(B, n, V)`` of ``x (B, n, E)``, or, with labels ``(B, n)``, the scalar loss sum.

        ``compile``: whether what happens to a chunk of logits is compiled.
        """
        # A slice of a parameter keeps what ZeRO gathered alive until backward, so it is taken only where it differs.
        weight = self.weight if len(self.weight) == self.vocab_size else self.weight[: self.vocab_size]
        if labels is None:
            return F.linear(x, weight)
        return linear_cross_entropy(x.flatten(0, 1), weight, labels.flatten(), self.chunk, compile)


def _chunks(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(first, min(first + chunk, rows)) for first in range(0, rows, chunk))
