"""One block of the model."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longnet_dist.attention.module import DilatedAttention
from longnet_dist.attention.positions import Positions
from longnet_dist.attention.stream import LayerCache
from longnet_dist.config.model import LongNetConfig
from longnet_dist.model.checkpointing import Execution, Passage
from longnet_dist.model.feed_forward import FeedForward
from longnet_dist.model.offload import HostMemory, Shelf
from longnet_dist.model.rows import RowParts
from longnet_dist.ops.matmul.choice import TORCH, Products, products_of

_PLAIN = Execution()


class Block(nn.Module):
    r"""A MAGNETO block (arXiv 2210.06423, section 2): LayerNorm before and inside both sub-layers.

    .. math::
        y = x + W_o\,\mathrm{LN}(\mathrm{attn}(\mathrm{LN}(x))), \qquad
        z = y + W_2\,\mathrm{LN}(\mathrm{gelu}(W_1 \mathrm{LN}(y)))

    Value, output and feed-forward projections begin with gain :math:`\sqrt{\ln 2M}` for :math:`M` blocks (section 2.2).

    Args:
        config: of the model.
        positions: shared by all blocks; None for none.
        group: the sequence-parallel group; None for one device.
        overlap: as in :class:`~longnet_dist.LongNet`.
        execution: what is kept, and how much is computed at once.
        memory: shared by all blocks of a model that offloads; None otherwise.
    """

    def __init__(
        self,
        config: LongNetConfig,
        positions: Positions | None,
        group: dist.ProcessGroup | None,
        overlap: bool = True,
        execution: Execution = _PLAIN,
        memory: HostMemory | None = None,
    ) -> None:
        super().__init__()
        self.execution, self.memory = execution, memory
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
        execution, attention = self.execution, self.self_attn
        spec, table = attention.prepare(x, start, total_rows, cache)
        weights = dict(self.named_parameters())
        compile = execution.compiles(self.training, cache is not None)
        products = self._products(x) if compile else TORCH
        parts = RowParts(weights, table, attention.head_dim, attention.norm_eps, execution.tile, compile, products)
        stay, shape = not execution.offload_projections, (x.shape[0], x.shape[1])
        passage = Passage(parts, spec, execution.checkpointing, shape, self._shelf(), stay)
        return passage.run(x.flatten(0, 1)).view_as(x)

    def _products(self, x: Tensor) -> Products:
        maps = self.self_attn.q_proj, self.self_attn.k_proj, self.ffn.fc1
        widths = tuple(linear.out_features for linear in maps)
        return products_of(self.execution.products, x.device, x.dtype, x.shape[0] * x.shape[1], widths)

    def _shelf(self) -> Shelf | None:
        if not torch.is_grad_enabled():
            return None
        return self.memory.shelf(self.execution.offload) if self.memory else Shelf()
