"""The feed-forward network of a block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from longnet_dist.config.block_style import Activation, BlockStyle

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
_OWN = BlockStyle()


class FeedForward(nn.Module):
    """Apply ``fc2(norm(gelu(fc1(x))))``: the LayerNorm inside is MAGNETO's (arXiv 2210.06423, section 2).

    A style may take the norm away, or another activation.

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
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.ffn_layernorm = nn.LayerNorm(ffn_dim, eps=norm_eps) if style.sub_norm else nn.Identity()
        self.fc2 = nn.Linear(ffn_dim, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_normal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(…, E)`` for ``x (…, E)``, token by token."""
        inner = F.dropout(self._activated(self.fc1(x)), self.style.activation_dropout, self.training)
        out: Tensor = self.fc2(self.ffn_layernorm(inner))
        return out

    def _activated(self, x: Tensor) -> Tensor:
        activation = _ACTIVATIONS[self.style.activation]
        return activation(x.float()).to(x.dtype) if self.style.activation_float32 else activation(x)
