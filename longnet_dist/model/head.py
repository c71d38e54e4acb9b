"""The language model's head: logits, or the loss without whole logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longnet_dist.model.loss import linear_cross_entropy


class LanguageModelHead(nn.Module):
    """Project states to logits without a bias; with labels, return the sum of the cross-entropies instead.

    Projection and loss are one module because ZeRO stage 3 gathers a module's parameters around its call only.

    Args:
        dim: model dim ``E``.
        vocab_size: ``V``. A caller that ties ``weight`` to an embedding may give it more rows; those are no outputs.
        chunk: rows of logits that the loss computes at once.
    """

    def __init__(self, dim: int, vocab_size: int, chunk: int) -> None:
        super().__init__()
        self.vocab_size, self.chunk = vocab_size, chunk
        self.weight: Tensor = nn.Parameter(torch.empty(vocab_size, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, x: Tensor, labels: Tensor | None = None, compile: bool = False) -> Tensor:
        """Return logits ``(B, n, V)`` of ``x (B, n, E)`` or, with labels ``(B, n)``, the scalar loss sum.

        Args:
            x: the states behind the last norm.
            labels: int64 in ``0 … V-1``, or :data:`~longnet_dist.model.loss.IGNORE_INDEX`; None for logits.
            compile: whether the work on a chunk of logits is compiled.
        """
        # A slice of a parameter keeps what ZeRO gathered alive until backward, so it is taken only where it differs.
        weight = self.weight if len(self.weight) == self.vocab_size else self.weight[: self.vocab_size]
        if labels is None:
            return F.linear(x, weight)
        return linear_cross_entropy(x.flatten(0, 1), weight, labels.flatten(), self.chunk, compile)
