"""The feed-forward network of a block."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from longnet_dist.ops.gelu_norm.choice import PLAIN


class FeedForward(nn.Module):
    """``fc2(norm(gelu(fc1(x))))``: the LayerNorm inside is MAGNETO's (arXiv 2210.06423, section 2).

    Args:
        dim: model dim ``E``.
        ffn_dim: inner dim.
        norm_eps: epsilon of the norm.
        gain: factor of the Xavier normal initialisation.
    """

    def __init__(self, dim: int, ffn_dim: int, *, norm_eps: float = 1e-5, gain: float = 1.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.ffn_layernorm = nn.LayerNorm(ffn_dim, eps=norm_eps)
        self.fc2 = nn.Linear(ffn_dim, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_normal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x (…, E)`` to ``(…, E)``, row by row."""
        return feed_forward(x, dict(self.named_parameters()), self.ffn_layernorm.eps)


def feed_forward(x: Tensor, weights: Mapping[str, Tensor], norm_eps: float) -> Tensor:
    """:class:`FeedForward` on its parameters by name."""
    inner = F.linear(x, weights["fc1.weight"], weights["fc1.bias"])
    inner = PLAIN.forward(inner, weights["ffn_layernorm.weight"], weights["ffn_layernorm.bias"], norm_eps)
    return F.linear(inner, weights["fc2.weight"], weights["fc2.bias"])
