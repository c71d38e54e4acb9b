"""One block of the model: the readable mathematics."""

from __future__ import annotations

import math
from typing import Protocol

import torch.distributed as dist
from torch import Tensor, nn

from longnet_dist.attention.module import DilatedAttention
from longnet_dist.attention.positions import Positions
from longnet_dist.attention.stream import LayerCache
from longnet_dist.config.model import LongNetConfig
from longnet_dist.geometry.documents import Documents
from longnet_dist.model.feed_forward import FeedForward


class BlockRunner(Protocol):
    """Run a block in place of its modules, with the same result: see :mod:`longnet_dist.engine`."""

    def __call__(
        self,
        block: Block,
        x: Tensor,
        start: int | None,
        total_rows: int | None,
        cache: LayerCache | None,
        documents: Documents | None,
    ) -> Tensor:
        """Return what :meth:`Block.compute` returns."""


class Block(nn.Module):
    r"""Compute a MAGNETO block (arXiv 2210.06423, section 2): LayerNorm before and inside both sub-layers.

    .. math::
        y = x + W_o\,\mathrm{LN}(\mathrm{attn}(\mathrm{LN}(x))), \qquad
        z = y + W_2\,\mathrm{LN}(\mathrm{gelu}(W_1 \mathrm{LN}(y)))

    Value, output and feed-forward projections begin with gain :math:`\sqrt{\ln 2M}` for :math:`M` blocks (section 2.2).

    Args:
        config: of the model.
        positions: shared by all blocks; None for none.
        group: the sequence-parallel group; None for one device.
        overlap, backend, deterministic: as in :class:`~longnet_dist.LongNet`.

    Attributes:
        engine: runs the block in place of its modules; None unless an execution was attached.
    """

    def __init__(
        self,
        config: LongNetConfig,
        positions: Positions | None,
        group: dist.ProcessGroup | None,
        overlap: bool = True,
        backend: str = "auto",
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.engine: BlockRunner | None = None
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
            backend=backend,
            overlap=overlap,
            deterministic=deterministic,
        )
        self.self_attn.reset_parameters(gain)
        self.final_layer_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim or 4 * config.dim, norm_eps=config.norm_eps, gain=gain)

    def forward(
        self,
        x: Tensor,
        start: int | None = None,
        total_rows: int | None = None,
        cache: LayerCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Return ``(B, n, E)`` for ``x (B, n, E)``; other arguments as in :meth:`DilatedAttention.forward`."""
        if self.engine is not None:
            return self.engine(self, x, start, total_rows, cache, documents)
        return self.compute(x, start, total_rows, cache, documents)

    def compute(
        self,
        x: Tensor,
        start: int | None,
        total_rows: int | None,
        cache: LayerCache | None,
        documents: Documents | None,
    ) -> Tensor:
        """Call the block's own modules; arguments and result of :meth:`forward`."""
        normed = self.self_attn_layer_norm(x)
        x = x + self.self_attn(normed, start=start, total_rows=total_rows, cache=cache, cu_seqlens=documents)
        out: Tensor = x + self.ffn(self.final_layer_norm(x))
        return out
