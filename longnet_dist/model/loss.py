"""The output projection and a cross-entropy that never holds all logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from longnet_dist.kernels.contract import wide_dtype
from longnet_dist.model.compiled import run

IGNORE_INDEX = -100


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, chunk: int, compile: bool = False) -> Tensor:
    """Sum of the cross-entropies of ``softmax(x weightᵀ)``; ``chunk`` rows of logits exist at a time.

    Softmax, the loss and the sum of the chunks' gradients of ``weight`` are float32 (float64 for float64 inputs);
    backward makes the logits again.

    Args:
        x: ``(rows, E)``.
        weight: ``(V, E)``, in the dtype of ``x``.
        labels: ``(rows,)`` int64 in ``0 … V-1``, or :data:`IGNORE_INDEX` for a row without label.
        chunk: rows, at least 1.
        compile: whether what happens to a chunk of logits is compiled.

    Returns:
        Scalar, float32 or float64.
    """
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, labels, chunk, compile)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, chunk: int, compile: bool) -> Tensor:
        ctx.save_for_backward(x, weight, labels)
        ctx.chunk, ctx.compile = chunk, compile
        loss = torch.zeros((), dtype=wide_dtype(x.dtype), device=x.device)
        x, weight = x.detach(), weight.detach()
        for rows in _chunks(len(x), chunk):
            loss += run(_loss_of, compile, x[rows], weight, labels[rows])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, labels = (tensor.detach() for tensor in ctx.saved_tensors)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide_dtype(x.dtype))
        for rows in _chunks(len(x), ctx.chunk):
            run(_write_gradients, ctx.compile, x[rows], weight, labels[rows], dloss, dx[rows], dweight)
        return dx, dweight.to(weight.dtype), None, None, None


def _loss_of(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, weight).to(wide_dtype(x.dtype))
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def _write_gradients(x: Tensor, weight: Tensor, labels: Tensor, dloss: Tensor, dx: Tensor, dweight: Tensor) -> None:
    """Write the gradient of some rows, add that of the weight."""
    labelled = (labels != IGNORE_INDEX).unsqueeze(1)
    probabilities = F.linear(x, weight).to(dweight.dtype).softmax(-1)
    right = torch.arange(len(weight), device=x.device) == labels.unsqueeze(1)
    dlogits = ((probabilities - right.to(dweight.dtype)) * (labelled * dloss)).to(x.dtype)
    dx.copy_(dlogits @ weight)
    dweight.add_(dlogits.T @ x)


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
