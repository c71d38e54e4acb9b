"""Transformers with dilated attention (LongNet, arXiv 2307.02486) on sequences that are split over ranks.

A token's way::

    files -- longnet prepare --> token file                                                      data
      '-> each rank maps its rows [start, stop) and their labels (shifted before sharding)
            '-> embedding -> block x layers ------------------> norm -> chunked loss             model
                  | norm -> q, k, v -> positions (global rows) -> attention -> norm -> projection -> +
                  | norm -> feed-forward (norm inside) -> +       |
                  |     dense pieces  (segments in the slice) ----+ one running (out, LSE)       attention
                  |     shared pieces (segments across ranks) ----' after the exchange of K/V    comm
            '-> loss = sum over all ranks / number of labelled rows of all ranks
            '-> backward -> DeepSpeed ZeRO over data x sequence ranks -> checkpoint              train

Shapes, everywhere: ``B`` batch, ``N`` rows of the whole sequence, ``n`` rows of this rank, ``H`` query heads,
``Hkv`` key/value heads, ``D`` head dim, ``E`` model dim, ``V`` vocabulary, ``w`` segment length, ``r`` dilation rate,
``P`` sequence ranks.

Names are imported when first used, so that geometry and configuration need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longnet_dist.attention.functional import dilated_attention
    from longnet_dist.attention.module import DilatedAttention
    from longnet_dist.attention.positions import Positions
    from longnet_dist.attention.sink import phantom_keys
    from longnet_dist.attention.stream import Stream
    from longnet_dist.attention.weights import attention_weights
    from longnet_dist.caches import clear_caches
    from longnet_dist.config.encoder_model import EncoderConfig
    from longnet_dist.config.model import LongNetConfig, named_model
    from longnet_dist.geometry.pattern import DilatedPattern
    from longnet_dist.model.encoder import LongNetEncoder
    from longnet_dist.model.longnet import LongNet

__version__ = "0.2.0"

__all__ = [
    "DilatedAttention",
    "DilatedPattern",
    "EncoderConfig",
    "LongNet",
    "LongNetConfig",
    "LongNetEncoder",
    "Positions",
    "Stream",
    "attention_weights",
    "clear_caches",
    "dilated_attention",
    "named_model",
    "phantom_keys",
]

_HOMES = {
    "DilatedAttention": "attention.module",
    "DilatedPattern": "geometry.pattern",
    "EncoderConfig": "config.encoder_model",
    "LongNet": "model.longnet",
    "LongNetConfig": "config.model",
    "LongNetEncoder": "model.encoder",
    "Positions": "attention.positions",
    "Stream": "attention.stream",
    "attention_weights": "attention.weights",
    "clear_caches": "caches",
    "dilated_attention": "attention.functional",
    "named_model": "config.model",
    "phantom_keys": "attention.sink",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
