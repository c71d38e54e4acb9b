"""The output projection and a cross-entropy that never holds all logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE_INDEX = -100


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Sum of the cross-entropies of ``softmax(x weightᵀ)``; ``chunk`` rows of logits exist at a time.

    Softmax, the loss and the sum of the chunks' gradients of ``weight`` are float32 (float64 for float64 inputs);
    backward makes the logits again.

    Args:
        x: ``(rows, E)``.
        weight: ``(V, E)``, in the dtype of ``x``.
        labels: ``(rows,)`` int64 in ``0 … V-1``, or :data:`IGNORE_INDEX` for a row without label.
        chunk: rows, at least 1.

    Returns:
        Scalar, float32 or float64.
    """
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, labels, chunk)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(x, weight, labels)
        ctx.chunk = chunk
        loss = torch.zeros((), dtype=_wide(x), device=x.device)
        for rows in _chunks(len(x), chunk):
            logits = F.linear(x[rows], weight).to(loss.dtype)
            loss += F.cross_entropy(logits, labels[rows], ignore_index=IGNORE_INDEX, reduction="sum")
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, labels = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=_wide(x))
        for rows in _chunks(len(x), ctx.chunk):
            kept = (labels[rows] != IGNORE_INDEX).unsqueeze(1)
            dlogits = F.linear(x[rows], weight).to(dweight.dtype).softmax(-1)
            dlogits.scatter_add_(1, labels[rows].unsqueeze(1) * kept, -kept.to(dlogits.dtype))
            dlogits = (dlogits * (kept * dloss)).to(x.dtype)
            dx[rows] = dlogits @ weight
            dweight += dlogits.T @ x[rows]
        return dx, dweight.to(weight.dtype), None, None


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

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits ``(B, n, V)`` of ``x (B, n, E)``, or, with labels ``(B, n)``, the scalar loss sum."""
        # A slice of a parameter keeps what ZeRO gathered alive until backward, so it is taken only where it differs.
        weight = self.weight if len(self.weight) == self.vocab_size else self.weight[: self.vocab_size]
        if labels is None:
            return F.linear(x, weight)
        return linear_cross_entropy(x.flatten(0, 1), weight, labels.flatten(), self.chunk)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(first, min(first + chunk, rows)) for first in range(0, rows, chunk))
