"""One block of the model: the readable mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from longnet_dist.attention.decoding import Cache, DecodingLayer
from longnet_dist.attention.masked import attention_class
from longnet_dist.attention.phantoms import PhantomKeys
from longnet_dist.attention.positions import Positions
from longnet_dist.config.block_style import BlockStyle
from longnet_dist.config.model import LongNetConfig
from longnet_dist.geometry.documents import Documents
from longnet_dist.model.feed_forward import FeedForward
from longnet_dist.model.stochastic_depth import stochastic_depth


class BlockRunner(Protocol):
    """Run a block in place of its modules, with the same result: see :mod:`longnet_dist.engine`."""

    def __call__(
        self,
        block: Block,
        x: Tensor,
        start: int | None,
        total_rows: int | None,
        cache: Cache | None,
        documents: Documents | None,
    ) -> Tensor:
        """Return what :meth:`Block.compute` returns."""


class Block(nn.Module):
    r"""Compute a MAGNETO block (arXiv 2210.06423, section 2): LayerNorm before and inside both sub-layers.

    .. math::
        y = x + W_o\,\mathrm{LN}(\mathrm{attn}(\mathrm{LN}(x))), \qquad
        z = y + W_2\,\mathrm{LN}(\mathrm{gelu}(W_1 \mathrm{LN}(y)))

    Value, output and feed-forward projections begin with gain :math:`\sqrt{\ln 2M}` for :math:`M` blocks (section 2.2).
    A style changes what stands here: with factor :math:`α` of the residual, the norm before or behind the sum,

    .. math::
        y = α x + W_o\,\mathrm{attn}(\mathrm{LN}(x)) \quad\text{or}\quad y = \mathrm{LN}(α x + W_o\,\mathrm{attn}(x)).

    Args:
        config: of the model.
        positions: shared by the blocks of one grid; None for none.
        group: the sequence-parallel group; None for one device.
        overlap, backend, deterministic: as in :class:`~longnet_dist.LongNet`.
        style: what differs from the equation above; None: what the configuration says.
        phantom_keys: torchscale's zero keys, shared by all blocks; None for none.
        layer: number of the block, which its pattern may depend on.

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
        style: BlockStyle | None = None,
        phantom_keys: PhantomKeys | None = None,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.engine: BlockRunner | None = None
        self.style = style = config.style(layer) if style is None else style
        self.group = group
        gain = math.sqrt(math.log(2 * config.layers)) if style.gain is None else style.gain
        self.self_attn_layer_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        pattern = config.layer_pattern(layer)
        self.self_attn = attention_class(pattern)(
            config.dim,
            config.heads,
            pattern,
            kv_heads=config.kv_heads,
            causal=config.causal,
            qk_norm=config.qk_norm,
            sinks=config.sinks,
            positions=positions,
            group=group,
            sub_norm=style.sub_norm,
            norm_eps=config.norm_eps,
            backend=backend,
            overlap=overlap,
            deterministic=deterministic,
            phantom_keys=phantom_keys,
        )
        self.self_attn.reset_parameters(gain)
        self.final_layer_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config.dim, config.inner_dim, norm_eps=config.norm_eps, gain=gain, style=style)

    def forward(
        self,
        x: Tensor,
        start: int | None = None,
        total_rows: int | None = None,
        cache: Cache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Return ``(B, n, E)`` for ``x (B, n, E)``; other arguments as in :meth:`DilatedAttention.forward`."""
        if isinstance(cache, DecodingLayer) and cache.runner is not None:
            return cache.runner(self, x, cache)
        if self.engine is not None:
            return self.engine(self, x, start, total_rows, cache, documents)
        return self.compute(x, start, total_rows, cache, documents)

    def compute(
        self,
        x: Tensor,
        start: int | None,
        total_rows: int | None,
        cache: Cache | None,
        documents: Documents | None,
    ) -> Tensor:
        """Call the block's own modules; arguments and result of :meth:`forward`."""

        def attend(rows: Tensor) -> Tensor:
            out: Tensor = self.self_attn(rows, start=start, total_rows=total_rows, cache=cache, cu_seqlens=documents)
            return out

        def add(x: Tensor, norm: nn.Module, layer: Callable[[Tensor], Tensor]) -> Tensor:
            y = F.dropout(layer(norm(x) if self.style.pre_norm else x), self.style.dropout, self.training)
            if self.training and self.style.drop_path:
                y = stochastic_depth(y, self.style.drop_path, documents, start, self.group)
            x = (x if self.style.residual_scale == 1 else x * self.style.residual_scale) + y
            return x if self.style.pre_norm else norm(x)

        return add(add(x, self.self_attn_layer_norm, attend), self.final_layer_norm, self.ffn)
