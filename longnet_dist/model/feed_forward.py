"""The feed-forward network of a block."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """Apply ``fc2(norm(gelu(fc1(x))))``: the LayerNorm inside is MAGNETO's (arXiv 2210.06423, section 2).

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
        """Return ``(…, E)`` for ``x (…, E)``, token by token."""
        out: Tensor = self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))
        return out
