"""The feed-forward network of a block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longnet_dist.config.block_style import Activation, BlockStyle

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
_OWN = BlockStyle()


class FeedForward(nn.Module):
    """Apply ``fc2(norm(gelu(fc1(x))))``: the LayerNorm inside is MAGNETO's (arXiv 2210.06423, section 2).

    A style may take the norm away, or another activation. In a gated network ``fc1`` has two outputs for each of the
    inner dim, first all gates and then what they multiply: ``fc2(norm(silu(gate(x)) * up(x)))`` (arXiv 2002.05202).

    Args:
        dim: model dim ``E``.
        ffn_dim: inner dim.
        norm_eps: epsilon of the norm.
        gain: factor of the Xavier normal initialisation.
        style: activation, norm and dropout.
    """

    def __init__(
        self, dim: int, ffn_dim: int, *, norm_eps: float = 1e-5, gain: float = 1.0, style: BlockStyle = _OWN
    ) -> None:
        super().__init__()
        self.style = style
        self.fc1 = nn.Linear(dim, (1 + style.gated) * ffn_dim)
        self.ffn_layernorm = nn.LayerNorm(ffn_dim, eps=norm_eps) if style.sub_norm else nn.Identity()
        self.fc2 = nn.Linear(ffn_dim, dim)
        # Gate and input are linear layers of their own; together they would begin with smaller weights.
        for weight in (*torch.split(self.fc1.weight.detach(), ffn_dim), self.fc2.weight):
            nn.init.xavier_normal_(weight, gain)
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(…, E)`` for ``x (…, E)``, token by token."""
        h = self.fc1(x)
        if self.style.gated:
            gate, up = h.chunk(2, -1)
            h = self._activated(gate) * up
        else:
            h = self._activated(h)
        inner = F.dropout(h, self.style.activation_dropout, self.training)
        out: Tensor = self.fc2(self.ffn_layernorm(inner))
        return out

    def _activated(self, x: Tensor) -> Tensor:
        activation = _ACTIVATIONS[self.style.activation]
        return activation(x.float()).to(x.dtype) if self.style.activation_float32 else activation(x)
