"""The cross-entropy of a linear layer's outputs, computed in chunks so that the logits never exist whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longnet_dist.numerics import differentiable_once, wide_dtype
from longnet_dist.ops.compiled import run

IGNORE_INDEX = -100


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, chunk: int, compile: bool = False) -> Tensor:
    r"""Return the sum of the cross-entropies of ``softmax(x weightᵀ)``; only ``chunk`` rows of logits exist at a time.

    With logits :math:`l_i = x_i W^\top` and label :math:`y_i` of row :math:`i`,

    .. math::
        L = \sum_i \Big(\log \sum_v e^{l_{iv}} - l_{iy_i}\Big), \qquad dl_{iv} = p_{iv} - [v = y_i], \qquad
        p_{iv} = \frac{e^{l_{iv}}}{\sum_u e^{l_{iu}}},

    .. math::
        dx = dl\,W, \qquad dW = dl^\top x .

    Forward computes these gradients while it has the logits, if there is a graph. Backward multiplies them by the
    gradient of the loss. Softmax, loss and the sum of the chunks' dW are float32 (float64 for float64 inputs).

    Args:
        x: ``(rows, E)``.
        weight: ``(V, E)``, in the dtype of ``x``.
        labels: ``(rows,)`` int64 in ``0 … V-1``, or :data:`IGNORE_INDEX` for a row without label.
        chunk: rows of logits at once, at least 1.
        compile: whether the work on a chunk of logits is compiled.

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
    """Compute the loss and its gradients chunk by chunk in forward; scale the gradients in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, chunk: int, compile: bool) -> Tensor:
        x, weight, vocab = x.detach(), _aligned(weight.detach()), len(weight)
        if torch.compiler.is_compiling():
            loss, dx, dweight = _gradients_of_graph(x, weight, labels, vocab, chunk)
        else:
            loss = torch.zeros((), dtype=wide_dtype(x.dtype), device=x.device)
            dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide_dtype(x.dtype))
            for rows in _chunks(len(x), chunk):
                loss += run(_write_gradients, compile, x[rows], weight, labels[rows], vocab, dx[rows], dweight)
        ctx.save_for_backward(dx, dweight[:vocab])
        ctx.chunk, ctx.compile = chunk, compile
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        gradient, dweight = ctx.saved_tensors
        # Forward took dL = 1; the chain rule leaves the factor dL. The saved gradients stay for a second backward.
        if torch.compiler.is_compiling():
            return gradient * dloss, (dweight * dloss).to(gradient.dtype), None, None, None
        dx = torch.empty_like(gradient)
        for rows in _chunks(len(dx), ctx.chunk):
            run(_write_scaled, ctx.compile, gradient[rows], dloss, dx[rows])
        return dx, (dweight * dloss).to(dx.dtype), None, None, None


def _aligned(weight: Tensor) -> Tensor:
    """Append rows of zeros to the weight, so that rows of logits begin at addresses where matmuls are fast."""
    missing = -len(weight) % _alignment(weight.device)
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


def _alignment(device: torch.device) -> int:
    """Return the number of which a row of logits has a multiple."""
    return 64 if device.type == "cuda" else 1


def _loss_of(x: Tensor, weight: Tensor, labels: Tensor, vocab: int) -> Tensor:
    """Return the loss sum of one chunk of rows."""
    loss, _, _ = _softmax(F.linear(x, weight), labels, vocab)
    return loss


def _gradients_of_graph(
    x: Tensor, weight: Tensor, labels: Tensor, vocab: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss sum, ``dx`` and ``dweight`` of all rows, without writes to views: torch 2.11 loses them."""
    total = torch.zeros((), dtype=wide_dtype(x.dtype), device=x.device)
    gradients: list[Tensor] = []
    sums = torch.zeros_like(weight, dtype=total.dtype)
    for rows in _chunks(len(x), chunk):
        loss, dx, dweight = _gradients(x[rows], weight, labels[rows], vocab)
        total, sums = total + loss, sums + dweight
        gradients.append(dx)
    return total, torch.cat(gradients), sums


def _gradients(x: Tensor, weight: Tensor, labels: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss sum, ``dx`` and ``dweight`` of one chunk of rows."""
    # exponentials = exp(l - max l), total their row sums.
    loss, exponentials, total = _softmax(F.linear(x, weight), labels, vocab)
    right = torch.arange(len(weight), device=x.device) == labels.unsqueeze(1)
    labelled = (labels != IGNORE_INDEX).unsqueeze(1)
    # dl = p - onehot(y) for labelled rows, 0 for the others. It overwrites the exponentials: no tensor is larger.
    dlogits = exponentials.div_(total).add_(right, alpha=-1).mul_(labelled).to(x.dtype)
    # l = x Wᵀ  ⇒  dx = dl W, dW = dlᵀ x.
    return loss, dlogits @ weight, dlogits.T @ x


def _write_gradients(x: Tensor, weight: Tensor, labels: Tensor, vocab: int, dx: Tensor, dweight: Tensor) -> Tensor:
    """Return the loss sum of one chunk of rows; write its ``dx`` and add its ``dweight``."""
    loss, own_dx, own_dweight = _gradients(x, weight, labels, vocab)
    dx.copy_(own_dx)
    dweight.add_(own_dweight)
    return loss


def _write_scaled(gradient: Tensor, dloss: Tensor, dx: Tensor) -> None:
    """Write the gradient of ``dloss`` times the loss."""
    dx.copy_(gradient * dloss)


def _softmax(logits: Tensor, labels: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss sum, and numerators ``(rows, V)`` and denominators ``(rows, 1)`` of the softmax.

    Only the first ``vocab`` logits of a row count. torch's cross-entropy would compute the logarithms of all
    probabilities and read one of each row.
    """
    wide, labelled = logits.to(wide_dtype(logits.dtype)), labels != IGNORE_INDEX
    label = torch.where(labelled, labels, 0).unsqueeze(1)
    # l_iy. A row without label reads logit 0, and its loss is not summed.
    of_label = wide[:, :vocab].gather(1, label)
    if wide.shape[1] > vocab:  # the logits of the rows of zeros: exp(-inf) = 0
        wide = wide.masked_fill(torch.arange(wide.shape[1], device=wide.device) >= vocab, -torch.inf)
    # log Σ exp(l) = m + log Σ exp(l - m) with m = max l, which cannot overflow.
    largest = wide.amax(-1, keepdim=True)
    exponentials = (wide - largest).exp_()
    total = exponentials.sum(-1, keepdim=True)
    losses = (total.log() + largest - of_label).squeeze(1)
    return torch.where(labelled, losses, 0.0).sum(), exponentials, total


def _chunks(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(first, min(first + chunk, rows)) for first in range(0, rows, chunk))
