"""The loss of a Hugging Face model's head, in chunks of tokens: its whole logits never exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longnet_dist.errors import ShapeError
from longnet_dist.model.loss import IGNORE_INDEX, linear_cross_entropy
from longnet_dist.numerics import wide_dtype

CHUNK = 1024
"""Tokens whose logits exist at once: 0.6 GiB in float32 for 151,936 ids."""


def head_loss(head: nn.Module, states: Tensor, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return the sum of the cross-entropies of ``head(states)``; only ``chunk`` tokens have logits at a time.

    A plain linear layer without a bias computes its gradients in the forward pass. Any other head, such as one with an
    adapter, is called for each chunk and recomputed in the backward pass. The head is always called as a module, so
    hooks run and ZeRO stage 3 gathers its weights.

    Args:
        head: maps ``(tokens, E)`` to logits ``(tokens, V)``, as ``model.get_output_embeddings()`` does.
        states: ``(…, E)``, what the head gets.
        labels: ``(…)`` int64 in ``0 … V-1``, or ``-100`` for a token without a label; not shifted here.
        chunk: at least 1.

    Returns:
        Scalar, float32 (float64 for float64 states), differentiable.

    Raises:
        ShapeError: labels that do not fit the states.
    """
    if states.shape[:-1] != labels.shape:
        raise ShapeError(f"labels must be {tuple(states.shape[:-1])} as the states, but are {tuple(labels.shape)}")
    states, labels = states.reshape(-1, states.shape[-1]), labels.reshape(-1).to(states.device)
    if type(head) is nn.Linear and head.bias is None:

        def fused(x: Tensor) -> Tensor:
            weight, device = head.weight, x.device.type
            if torch.is_autocast_enabled(device):  # one cast, not one a chunk
                x, weight = (y.to(torch.get_autocast_dtype(device)) for y in (x, weight))
            with torch.autocast(device, enabled=False):
                return linear_cross_entropy(x, weight, labels, chunk)

        with replaced_forward(head, fused):
            total: Tensor = head(states)
        return total
    total = torch.zeros((), dtype=wide_dtype(states.dtype), device=states.device)
    for x, y in zip(torch.split(states, chunk), torch.split(labels, chunk), strict=True):
        total = total + checkpoint(_called, head, x, y, use_reentrant=False)
    return total


def _called(head: nn.Module, states: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy_sum(head(states), labels)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of cross-entropies of ``logits (…, V)``, in float32 or float64; labels as :func:`head_loss`."""
    wide = logits.to(wide_dtype(logits.dtype)).flatten(0, -2)
    return F.cross_entropy(wide, labels.flatten().to(logits.device), ignore_index=IGNORE_INDEX, reduction="sum")


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module compute something else in this block; its hooks, and so ZeRO's gathering, stay.

    With the identity, a head passes its states on: ``logits`` of the model are then what :func:`head_loss` takes.
    """
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
