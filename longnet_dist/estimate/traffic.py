"""The traffic of a layer's exchange is counted by formulas, without building its plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from longnet_dist.estimate.activations import WIDE
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.geometry.exchange_plan import buffered_segments
from longnet_dist.geometry.overlap import first_halves
from longnet_dist.geometry.pattern import DilatedPattern, kept_rows
from longnet_dist.geometry.window import Segment, needs_exchange


@dataclass(frozen=True)
class Exchange:
    """An Exchange describes one layer's exchange in the last chunk, on the rank and of the layer that receive most.

    Attributes:
        received: records that the rank receives; a record is the key and the value of one row and one head.
        foreign: the number of them that come from other ranks.
        buffered_rows: rows of the compact buffers, each with all key/value heads.
        distant: the number of ``foreign`` that come from other hosts.
        bytes: bytes from other ranks in forward, and of their gradients in backward.
        collectives: collectives of a layer and chunk, forward and backward together.
    """

    received: int
    foreign: int
    distant: int
    buffered_rows: int
    bytes: int
    collectives: int


def exchange_of(layout: RunLayout, gpus_per_host: int = 8) -> Exchange:
    """Count the exchange of a layer; all counts are 0 if no segment crosses an edge.

    Args:
        layout: how the run is split over ranks; the ranks of a sequence are neighbours.
        gpus_per_host: ranks of a host.
    """
    found = [_exchange_of(layout, pattern, gpus_per_host) for pattern in layout.config.model.pattern_counts]
    return max(found, key=lambda exchange: exchange.received)


def _exchange_of(layout: RunLayout, pattern: DilatedPattern, gpus_per_host: int) -> Exchange:
    model, shards = layout.config.model, layout.last_chunk
    kv_heads = model.kv_heads or model.heads
    if not needs_exchange(pattern, shards):
        return Exchange(0, 0, 0, 0, 0, 0)
    # A causal rank receives from all before it, so the last receives most.
    rank = shards.num_ranks - 1 if model.causal else shards.num_ranks // 2
    halved = layout.merges_overlaps and model.causal and layout.num_chunks == 1  # as AttentionSpec.halves
    segments = buffered_segments(pattern, shards, rank, model.causal, first_halves(pattern) if halved else ())
    received = sum(_records(pattern, s, kv_heads, shards.start, shards.stop) for s in segments)
    own = sum(_records(pattern, s, kv_heads, *shards.window(rank)) for s in segments)
    first = rank - rank % gpus_per_host
    host = shards.window(first)[0], shards.window(min(first + gpus_per_host, shards.num_ranks) - 1)[1]
    near = sum(_records(pattern, s, kv_heads, *host) for s in segments)
    numbers = (received - own) * 2 * model.head_dim * layout.micro_batch_size
    return Exchange(
        received,
        received - own,
        received - near,
        sum(segment.compact_rows for segment in segments),
        numbers * (layout.itemsize + WIDE),
        2 if shards.num_ranks > 1 else 0,
    )


def _records(pattern: DilatedPattern, segment: Segment, kv_heads: int, start: int, stop: int) -> int:
    """Count the (row, head) pairs that a segment keeps in rows ``[start, stop)``."""
    first, last = max(segment.start, start) - segment.start, min(segment.stop, stop) - segment.start
    if last <= first:
        return 0
    rate, heads = segment.dilation_rate, Counter(pattern.offsets(pattern.branches[segment.branch], kv_heads))
    return sum(number * (kept_rows(last, o, rate) - kept_rows(first, o, rate)) for o, number in heads.items())
