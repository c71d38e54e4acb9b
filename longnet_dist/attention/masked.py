"""Attention with a mask over a whole sequence on one device: the baselines of dilated attention.

On a GPU FlexAttention computes it and skips the blocks that a mask leaves empty. On a CPU torch's scaled dot product
computes it, tile by tile of queries with the keys that they see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from longnet_dist.attention.decoding import Cache, DecodingLayer
from longnet_dist.attention.module import DilatedAttention
from longnet_dist.attention.validation import check_inputs
from longnet_dist.caches import bounded_cache
from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.geometry.masked_pattern import PART, WHOLE, MaskedPattern
from longnet_dist.geometry.pattern import DilatedPattern

FLEX_BLOCK = 128


def attention_class(pattern: DilatedPattern) -> type[DilatedAttention]:
    """Return the module that computes a layer's pattern."""
    return MaskedAttention if isinstance(pattern, MaskedPattern) else DilatedAttention


class MaskedAttention(DilatedAttention):
    """Apply multi-head attention with the mask of a pattern; parameters, positions and norms are those of its base.

    It computes whole sequences on one device, without packed documents.
    """

    pattern: MaskedPattern

    def __init__(self, dim: int, heads: int, pattern: DilatedPattern, **options: Any) -> None:
        if options.get("backend", "auto") != "auto" or options.get("phantom_keys") or options.get("sinks"):
            raise ConfigError(
                f"{pattern} is computed by FlexAttention or torch, without the backends, sinks and phantom keys of "
                f"dilated attention; use attention_backend=auto, no sinks and no phantom_keys"
            )
        super().__init__(dim, heads, pattern, **options)

    def forward(
        self,
        x: Tensor,
        *,
        start: int | None = None,
        total_rows: int | None = None,
        cache: Cache | None = None,
        cu_seqlens: Any = None,
    ) -> Tensor:
        """Return the layer's output; arguments as in :meth:`DilatedAttention.forward`.

        Args:
            x: ``(B, N, E)``.
            start: 0, if given.
            total_rows: ``N``, if the caller wants it checked.
            cache: of a stream whose present chunk is the whole sequence.
            cu_seqlens: must be None.

        Raises:
            ConfigError: several ranks, a chunk of a longer sequence, or packed documents.
            ShapeError: ``start`` or ``total_rows`` do not fit.
        """
        rows = x.shape[1]
        self._check(rows, start, total_rows, cache, cu_seqlens)
        table = None
        if self.positions is not None:
            dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
            place = 0, rows, rows, self.head_dim
            table = self.positions.table(self.pattern, *place, dtype, x.device, x.shape[0])
        q, k, v = self.project(x, table)
        out = masked_attention(q, k, v, self.pattern, self.causal)
        result: Tensor = self.out_proj(self.inner_attn_ln(rearrange(out, "b n h d -> b n (h d)")))
        return result

    def _obstacle(self, cache: Cache | None, cu_seqlens: Any) -> str:
        """Return what a call would need beyond one whole sequence on one device; empty if nothing."""
        if isinstance(cache, DecodingLayer):
            return "the next token of a text"
        stream = cache.stream if cache else None
        shards = stream.shards if stream else None
        ranks = max(dist.get_world_size(self.group) if self.group else 1, shards.num_ranks if shards else 1)
        if ranks > 1:
            return f"a sequence over {ranks} ranks"
        if shards and (shards.start, shards.stop) != (0, shards.total_rows):
            return f"tokens {shards.start} to {shards.stop - 1} of a stream of {shards.total_rows}"
        return "packed documents" if cu_seqlens is not None or (stream and stream.documents is not None) else ""

    def _check(
        self, rows: int, start: int | None, total_rows: int | None, cache: Cache | None, cu_seqlens: Any
    ) -> None:
        """Refuse what needs more than one whole sequence on one device, alike on all ranks."""
        what = self._obstacle(cache, cu_seqlens)
        if what:
            raise ConfigError(
                f"{self.pattern} computes whole sequences on one device, one document each, but was given {what}; use "
                f"attention=dilated or attention=full"
            )
        if start not in (None, 0) or total_rows not in (None, rows):
            raise ShapeError(
                f"{self.pattern} computes whole sequences, but was given {rows} tokens from token {start} on of "
                f"{total_rows}; pass all tokens"
            )


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: MaskedPattern, causal: bool = True, scale: float | None = None
) -> Tensor:
    """Return the attention ``(B, N, H, D)`` of ``q (B, N, H, D)`` to the ``k, v (B, N, Hkv, D)`` that a mask leaves.

    Args:
        q, k, v: queries, keys and values, of one dtype on one device.
        pattern: the mask.
        causal: whether a row sees only itself and earlier rows.
        scale: factor of the scores, ``D ** -0.5`` if not given.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
    """
    check_inputs(q, k, v)
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cuda":
        mask = _block_mask(pattern, q.shape[1], k.shape[2], q.shape[2], causal, q.device)
        grouped = q.shape[2] != k.shape[2]
        out = _compiled_flex()(queries, keys, values, block_mask=mask, scale=scale, enable_gqa=grouped)
    else:
        out = _by_tiles(queries, keys, values, pattern, causal, scale)
    return out.transpose(1, 2)


def _by_tiles(q: Tensor, k: Tensor, v: Tensor, pattern: MaskedPattern, causal: bool, scale: float | None) -> Tensor:
    """Compute a tile of queries at a time, with all keys that it sees; heads come before rows."""
    kv_heads, parts = k.shape[1], []
    heads = torch.arange(kv_heads)[:, None]
    for start, stop, rows, mask in pattern.tiles(k.shape[2], kv_heads, causal):
        index = torch.from_numpy(rows.copy())
        # (B, Hkv, K, D): every head has its own keys.
        key, value = k[:, heads, index], v[:, heads, index]
        seen = torch.from_numpy(mask)
        grouped = q.shape[1] != kv_heads
        part = F.scaled_dot_product_attention(q[:, :, start:stop], key, value, seen, scale=scale, enable_gqa=grouped)
        parts.append(part)
    return torch.cat(parts, 2)


@bounded_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


@bounded_cache(maxsize=8)
def _block_mask(
    pattern: MaskedPattern, N: int, kv_heads: int, heads: int, causal: bool, device: torch.device
) -> BlockMask:
    """Return the mask of FlexAttention: which blocks it computes, and which of them need the mask."""
    kinds = pattern.blocks(N, kv_heads, FLEX_BLOCK, causal).repeat(heads // kv_heads, 0)[None]

    def listed(kind: int) -> tuple[Tensor, Tensor]:
        """Return how many key blocks of a kind each query block has, and their numbers, ascending and first."""
        chosen = kinds == kind
        arrays = chosen.sum(-1), np.argsort(~chosen, axis=-1, kind="stable")
        number, order = (torch.from_numpy(array.astype(np.int32)).to(device) for array in arrays)
        return number, order

    def sees(batch: Tensor, head: Tensor, n: Tensor, m: Tensor) -> Tensor:
        found: Tensor = pattern.sees(n, m, head // (heads // kv_heads), N, causal)
        return found

    return BlockMask.from_kv_blocks(
        *listed(PART), *listed(WHOLE), BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees, seq_lengths=(N, N)
    )
