"""Linear layers behind a LayerNorm, and what follows them: all of a block but its attention is made of these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def normed_linear(
    x: Tensor, norm: nn.LayerNorm, layers: Sequence[nn.Linear], residual: Tensor | None = None, gelu: bool = False
) -> Tensor:
    """Return the outputs of linear layers for ``LayerNorm(x)``, side by side, ``(rows, outputs)``.

    Args:
        x: ``(rows, inputs)``.
        norm: with weight and bias.
        layers: with biases.
        residual: ``(rows, outputs)``, added to the result; None for none.
        gelu: whether GELU is applied to the result, before a residual.
    """
    u = norm(x)
    y = torch.cat([layer(u) for layer in layers], 1)
    y = F.gelu(y) if gelu else y
    return y if residual is None else residual + y
