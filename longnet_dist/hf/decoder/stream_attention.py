"""Attention of a decoder whose tokens are the present chunk of a stream, or the next tokens of texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from longnet_dist.attention.decoding import Decoding, DecodingLayer
from longnet_dist.attention.functional import dilated_attention
from longnet_dist.attention.stream import Stream
from longnet_dist.errors import ConfigError

STREAMED = "dilated_stream"
"""Under which attention and mask are registered; a model in memory has it, config.json never."""


@dataclass(frozen=True)
class StreamAttention:
    """Say how all layers attend in one pass; transformers hands it from the model to each layer.

    Attributes:
        stream: the stream whose present chunk the tokens are, or the texts of which they are the next ones.
        group: the sequence-parallel group; None for one device.
        overlap, backend, deterministic: as in :func:`~longnet_dist.dilated_attention`.
    """

    stream: Stream | Decoding
    group: dist.ProcessGroup | None
    overlap: bool
    backend: str
    deterministic: bool

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Return the attention ``(B, n, H, D)`` of a layer, counted from 0; with a group, all its ranks must call.

        Args:
            layer: number of the layer.
            q: ``(B, n, H, D)``.
            k, v: ``(B, n, Hkv, D)``.
            scale: factor of the scores.

        Raises:
            ShapeError: rows that are not those of the present chunk.
            ConfigError: a scale other than that of decoding, ``D ** -0.5``.
        """
        cache = self.stream.layers[layer]
        if isinstance(cache, DecodingLayer):
            if scale not in (None, q.shape[-1] ** -0.5):
                raise ConfigError(f"decoding scales scores by D ** -0.5, but the model by {scale}; use model.generate")
            return cache.attend(q, k, v)
        out = dilated_attention(
            q, k, v, cache.pattern, causal=True, scale=scale, group=self.group, backend=self.backend,
            deterministic=self.deterministic, overlap=self.overlap, cache=cache, cu_seqlens=cache.stream.documents,
        )  # fmt: skip
        return cast(Tensor, out)


def streamed_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    stream_attention: StreamAttention,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of a layer of transformers: ``(B, n, H, D)``, and None for the weights.

    Args:
        module: the layer's attention, which has the number of the layer.
        query: ``(B, H, n, D)``.
        key, value: ``(B, Hkv, n, D)``.
        attention_mask: None.
        scaling: factor of the scores.
        stream_attention: of this pass.
        others: of transformers, checked with the configuration.
    """
    number = cast(int, module.layer_idx)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return stream_attention.attend(number, q, k, v, scaling), None


def no_mask(*sizes: Any, **others: Any) -> None:
    """Return no mask: a stream has the documents."""


AttentionInterface.register(STREAMED, streamed_forward)
AttentionMaskInterface.register(STREAMED, no_mask)
