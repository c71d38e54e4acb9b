"""One block of the model."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor, nn

from longnet_dist.attention.module import DilatedAttention
from longnet_dist.attention.positions import Positions
from longnet_dist.attention.stream import LayerCache
from longnet_dist.config.model import LongNetConfig
from longnet_dist.model.feed_forward import FeedForward


class Block(nn.Module):
    r"""A MAGNETO block (arXiv 2210.06423, section 2): LayerNorm before and inside both sub-layers.

    .. math::
        y = x + W_o\,\mathrm{LN}(\mathrm{attn}(\mathrm{LN}(x))), \qquad
        z = y + W_2\,\mathrm{LN}(\mathrm{gelu}(W_1 \mathrm{LN}(y)))

    Value, output and feed-forward projections begin with gain :math:`\sqrt{\ln 2M}` for :math:`M` blocks (section 2.2).
    """

    def __init__(
        self, config: LongNetConfig, positions: Positions | None, group: dist.ProcessGroup | None, overlap: bool = True
    ) -> None:
        super().__init__()
        gain = math.sqrt(math.log(2 * config.layers))
        self.self_attn_layer_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.self_attn = DilatedAttention(
            config.dim,
            config.heads,
            config.pattern,
            kv_heads=config.kv_heads,
            causal=config.causal,
            qk_norm=config.qk_norm,
            positions=positions,
            group=group,
            sub_norm=True,
            norm_eps=config.norm_eps,
            overlap=overlap,
        )
        self.self_attn.reset_parameters(gain)
        self.final_layer_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim or 4 * config.dim, norm_eps=config.norm_eps, gain=gain)

    def forward(self, x: Tensor, start: int | None, total_rows: int | None, cache: LayerCache | None = None) -> Tensor:
        """``x (B, n, E)`` to ``(B, n, E)``; rows as in :meth:`DilatedAttention.forward`."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), start=start, total_rows=total_rows, cache=cache)
        out: Tensor = x + self.ffn(self.final_layer_norm(x))
        return out
