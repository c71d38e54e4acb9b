"""The plan of a batch of packed documents is made before the batch is computed, by another thread."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longnet_dist.attention.functional import AttentionSpec
from longnet_dist.attention.module import DilatedAttention
from longnet_dist.attention.stream import LayerCache, Stream
from longnet_dist.geometry.window import Shards

MOST_CHUNKS = 32  # the caches of plans keep a few hundred entries


def plan_stream(
    layers: Sequence[object], stream: Stream, length: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Plan the chunks of a stream of packed documents, so that the calls of all layers find their plans made.

    Without documents, and where there are so many chunks that their plans would not be kept, it does nothing.

    Args:
        layers: the :class:`DilatedAttention` of each layer.
        stream: nobody else may use it.
        length: rows of a chunk, of all ranks together.
        dtype, device: of queries, keys and values. Asking a weight would gather it with ZeRO stage 3.
    """
    chunks = stream.chunks(length)
    if stream.documents is not None and len(chunks) <= MOST_CHUNKS:
        for shards in chunks:
            plan_chunk(layers, stream, shards, dtype, device)


def plan_chunk(
    layers: Sequence[object], stream: Stream, shards: Shards, dtype: torch.dtype, device: torch.device
) -> None:
    """Plan one chunk; arguments as in :func:`plan_stream`."""
    stream.shards = shards
    planned = set()
    for attention, cache in zip(layers, stream.layers, strict=True):
        # A module that a user put here plans for itself.
        if isinstance(attention, DilatedAttention) and attention.pattern not in planned:
            planned.add(attention.pattern)
            _plan(attention, cache, shards.window(stream.rank), dtype, device)


def _plan(
    attention: DilatedAttention, cache: LayerCache, window: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    heads, kv_heads = attention.q_proj.out_features // attention.head_dim, attention.kv_heads
    # Only shapes, dtype and device of queries and keys count here, so these take no memory.
    queries, keys = (
        torch.empty(1, dtype=dtype, device=device).expand(1, window[1] - window[0], number, attention.head_dim)
        for number in (heads, kv_heads)
    )
    spec = AttentionSpec.of(
        queries,
        keys,
        keys,
        attention.pattern,
        attention.causal,
        None,
        None,  # a collective in this thread would meet those of the calls
        attention.backend,
        attention.deterministic,
        attention.overlap,
        None,
        cache,
    )
    calls = list(spec.dense_calls(kv_heads))
    if spec.exchanges:
        spec.plan(kv_heads)
        calls += [call for of_segment in spec.shared_calls(kv_heads) for call in of_segment]
    for call in calls:
        spec.kernel.prepare(call, queries)
