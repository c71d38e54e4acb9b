"""Dilated attention as a layer: projections, positions, attention, norm, projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from longnet_dist.attention.decoding import Cache, DecodingLayer
from longnet_dist.attention.functional import AttentionSpec, attend, dilated_attention
from longnet_dist.attention.packing import ONE_DOCUMENT, PackedBatch, documents_of_model
from longnet_dist.attention.phantoms import PhantomKeys
from longnet_dist.attention.positions import Positions, RotaryTable, rotate
from longnet_dist.attention.stream import LayerCache
from longnet_dist.attention.validation import check_group
from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.geometry.documents import Documents, as_integer
from longnet_dist.geometry.pattern import DilatedPattern, check_heads, check_pattern


class HeadNorm(nn.RMSNorm):
    """Apply RMSNorm to each head, ``(…, D)``, in the weight's dtype; the input's dtype is kept.

    The two differ under autocast, where linear layers give bfloat16 and weights stay float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed heads, as ``x (…, D)``."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def _dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the queries and keys of ``x``."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class DilatedAttention(nn.Module):
    """Apply multi-head dilated attention (LongNet, section 2.3), on one device or on a rank's slice of the sequence.

    It computes ``out_proj(norm(dilated_attention(q, k, v)))``. Parameters are named as in torchscale, whose state dicts
    load.

    Args:
        dim: model dim ``E``.
        heads: query heads ``H``; must divide ``dim``.
        pattern: the branches.
        kv_heads: key/value heads ``Hkv``, ``heads`` if not given; must divide ``heads``.
        causal: whether a row sees only itself and earlier rows.
        qk_norm: RMSNorm of every head's query and key, before the positions.
        sinks: a learned sink ``(H,)`` in every softmax (:mod:`longnet_dist.attention.sink`), 0 at first.
        positions: RoPE or xPos on global rows; None for none.
        group: the sequence-parallel group, its rank order the order of the slices; None for one device.
        sub_norm: LayerNorm before the last projection (MAGNETO, arXiv 2210.06423).
        norm_eps: epsilon of the norms.
        backend, overlap, deterministic: of the attention, see :func:`~longnet_dist.dilated_attention`.
        phantom_keys: torchscale's zero keys, for its bidirectional checkpoints; None for none.

    Raises:
        ConfigError: numbers of heads or a head dim that cannot work, or arguments of another type.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        pattern: DilatedPattern,
        *,
        kv_heads: int | None = None,
        causal: bool = True,
        qk_norm: bool = False,
        sinks: bool = False,
        positions: Positions | None = None,
        group: dist.ProcessGroup | None = None,
        sub_norm: bool = False,
        norm_eps: float = 1e-5,
        backend: str = "auto",
        overlap: bool = True,
        deterministic: bool = False,
        phantom_keys: PhantomKeys | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_pattern(pattern)
        check_group(group)
        check_heads(heads, kv_heads)
        if (as_integer(dim) or 0) < 1 or dim % heads:
            raise ConfigError(f"heads must divide dim, but dim={dim} and heads={heads}; make dim a multiple of heads")
        if not (positions is None or isinstance(positions, Positions)):
            raise ConfigError(f"positions must be a Positions or None, not {positions!r}; use Positions() for RoPE")
        self.dim, self.head_dim, self.norm_eps = dim, dim // heads, norm_eps
        if positions is not None and self.head_dim % 2:
            raise ConfigError(
                f"positions rotate pairs of channels, so dim/heads must be even, but dim={dim} and heads={heads} give "
                f"{self.head_dim}; use another number of heads, or positions=None"
            )
        self.pattern, self.causal, self.positions, self.group = pattern, causal, positions, group
        self.backend, self.overlap, self.deterministic = backend, overlap, deterministic
        self.kv_heads, self.phantom_keys = kv_heads, phantom_keys
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim)
        self.q_norm = HeadNorm(self.head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(self.head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.inner_attn_ln = nn.LayerNorm(dim, eps=norm_eps) if sub_norm else nn.Identity()
        self.out_proj = nn.Linear(dim, dim)
        if sinks and phantom_keys is not None:
            raise ConfigError("phantom keys are sinks of their own; use sinks=False, or phantom_keys=None")
        self.sinks = nn.Parameter(torch.zeros(heads)) if sinks else None
        self.reset_parameters()

    def reset_parameters(self, gain: float = 1.0) -> None:
        """Draw the weights: Xavier normal, with ``gain`` for the value and output projections; biases and sinks 0."""
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)
        for layer, factor in ((self.q_proj, 1.0), (self.k_proj, 1.0), (self.v_proj, gain), (self.out_proj, gain)):
            nn.init.xavier_normal_(layer.weight, factor)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        *,
        start: int | None = None,
        total_rows: int | None = None,
        cache: Cache | None = None,
        cu_seqlens: Any = None,
    ) -> Tensor:
        """Return the layer's output; with a group, all its ranks must call.

        Args:
            x: ``(B, n, E)``, this rank's rows.
            start: global row of the first one, if the caller wants it checked (on this rank alone): it follows from
                the group.
            total_rows: ``N``; if not given, one small collective finds it out.
            cache: this layer's cache in a stream, whose present chunk the rows are; or of texts that are decoded, whose
                next rows they are, ``(B, 1, E)``.
            cu_seqlens: edges of packed documents, as in :func:`~longnet_dist.dilated_attention`; positions count from a
                document's first row.

        Returns:
            ``(B, n, E)``.

        Raises:
            ShapeError: shapes, rows or ``start`` that do not fit the group.
            ConfigError: xPos cannot span the pattern.
        """
        if torch.compiler.is_compiling() and not isinstance(cache, DecodingLayer):
            return self._compiled(x, start, total_rows, cache, cu_seqlens)
        if not (cache is None or isinstance(cache, LayerCache | DecodingLayer)):
            raise ConfigError(
                f"cache must be that of a layer in a Stream or Decoding, but is of type {type(cache).__name__}; use "
                f"stream.layers[i]"
            )
        stream = cache.stream if isinstance(cache, LayerCache) else cache
        documents, as_one = documents_of_model(cu_seqlens, x.shape[0], x.shape[1], self.group, stream)
        if as_one:
            total = None if total_rows is None else total_rows * x.shape[0]
            joined: Tensor = self(x.flatten(0, 1)[None], start=start, total_rows=total, cu_seqlens=documents)
            return joined.view_as(x)
        if isinstance(cache, DecodingLayer):
            out = cache.attend(*self.project(x, None), self.sinks)
        else:
            spec, table = self.prepare(x, start, total_rows, cache, documents)
            out, _ = attend(*self.project(x, table), spec, self.sink(spec, x.device))
        result: Tensor = self.out_proj(self.inner_attn_ln(rearrange(out, "b n h d -> b n (h d)")))
        return result

    def _compiled(
        self, x: Tensor, start: int | None, total_rows: int | None, cache: LayerCache | None, cu_seqlens: Any
    ) -> Tensor:
        """Compute :meth:`forward` in a graph; over ranks, in streams and with phantom keys outside it."""
        whole = self.group is None and cache is None and start in (None, 0)
        if not whole or self.phantom_keys is not None or isinstance(cu_seqlens, Documents):
            eager = torch.compiler.disable(self.forward)  # type: ignore[no-untyped-call]
            outside: Tensor = eager(x, start=start, total_rows=total_rows, cache=cache, cu_seqlens=cu_seqlens)
            return outside
        from longnet_dist.attention.operators.rotations import operator_rotations  # only where a compiler traces

        table = None
        if self.positions is not None:
            like = x.new_empty(0, self.head_dim, dtype=_dtype(x))
            table = operator_rotations(self.positions, self.pattern, like, x.shape[0], x.shape[1], cu_seqlens)
        q, k, v = self.project(x, table)
        out = dilated_attention(
            q, k, v, self.pattern, causal=self.causal, backend=self.backend, deterministic=self.deterministic,
            total_rows=total_rows, cu_seqlens=cu_seqlens, sink=self.sinks,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        result: Tensor = self.out_proj(self.inner_attn_ln(out.flatten(2)))
        return result

    def sink(self, spec: AttentionSpec, device: torch.device) -> Tensor | None:
        """Return the sink of a call: the learned one ``(H,)``, or the phantom keys ``(n, H)``; None without either."""
        if self.phantom_keys is None:
            return self.sinks
        return self.phantom_keys.sink(self.pattern, spec.window, spec.shards.total_rows, spec.documents, device)

    def project(self, x: Tensor, table: RotaryTable | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries ``(B, n, H, D)``, keys and values ``(B, n, Hkv, D)`` of ``x (B, n, E)``.

        Args:
            x: tokens.
            table: rotations of all ``B·n`` of them; None without positions, or to leave the rotation to the caller.
        """
        q, k, v = (
            rearrange(layer(x), "b n (h d) -> b n h d", d=self.head_dim)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            shape = x.shape[:2]
            q, k = (torch.unflatten(rows, 0, shape) for rows in rotate(q.flatten(0, 1), k.flatten(0, 1), table))
        return q, k, v

    def prepare(
        self,
        x: Tensor,
        start: int | None,
        total_rows: int | None,
        cache: LayerCache | None,
        documents: Documents | None = None,
    ) -> tuple[AttentionSpec, RotaryTable | None]:
        """Return the checked attention of these rows and their rotations; arguments and errors of :meth:`forward`."""
        if self.group is None and (x.dim() != 3 or x.shape[2] != self.dim):  # ranks compare their heads below
            raise ShapeError(f"x must be (batch, rows, dim) with dim={self.dim}, but is {tuple(x.shape)}")
        batch, rows, dim = x.shape
        dtype = _dtype(x)
        # Only shapes, dtype and device of queries and keys count here, so these take no memory.
        queries, keys = (
            x.new_empty(1, dtype=dtype).expand(batch, rows, heads, self.head_dim)
            for heads in (dim // self.head_dim, self.kv_heads)
        )
        spec = AttentionSpec.of(
            queries,
            keys,
            keys,
            self.pattern,
            self.causal,
            None,
            self.group,
            self.backend,
            self.deterministic,
            self.overlap,
            total_rows,
            cache,
            documents=documents,
            packed=ONE_DOCUMENT if documents is None else PackedBatch((documents,)),
        )
        first_row, _ = spec.window
        if start not in (None, first_row):
            raise ShapeError(f"this rank's rows begin at global row {first_row} of its group, but start is {start}")
        if self.positions is None:
            return spec, None
        place = first_row, rows, spec.shards.total_rows
        return spec, self.positions.table(self.pattern, *place, self.head_dim, dtype, x.device, batch, spec.documents)
