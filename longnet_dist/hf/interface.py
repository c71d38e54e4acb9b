"""Attention and mask with the signatures that transformers calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.hf.compact_cache import layer_of
from longnet_dist.hf.operator import attend_documents
from longnet_dist.hf.parallel.sequence_slice import SequenceSlice
from longnet_dist.hf.pattern_field import pattern_of

_REFUSED = {
    "sliding_window": "a sliding window",
    "softcap": "a soft cap",
    "position_bias": "a bias of positions",
    "head_mask": "a mask of heads",
}


def dilated_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **others: Any,
) -> Tensor | None:
    """Return the mask ``(B, keys)`` of padding, true for tokens, or None; arguments of transformers' mask functions.

    Raises:
        ConfigError: a mask of the caller's own, or a cache that is longer than what was seen.
        ShapeError: a mask of other sequences, or of more or fewer tokens.
    """
    if use_vmap:
        raise ConfigError("dilated attention takes padding and documents, and no mask functions of other kinds")
    if isinstance(q_offset, Tensor) or kv_offset or q_offset + q_length != kv_length:
        raise ConfigError(
            f"dilated attention needs the keys of all tokens so far, but the cache gives {kv_length} for tokens "
            f"{q_offset} to {q_offset} + {q_length}; use a DynamicCache"
        )
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape != (batch_size, kv_length):
        raise ShapeError(
            f"attention_mask must be (batch, tokens so far), here {(batch_size, kv_length)}, but is "
            f"{tuple(attention_mask.shape)}; give a mask of all tokens, those in the cache too"
        )
    return attention_mask


def dilated_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    sequence_slice: SequenceSlice | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute dilated attention for a module of transformers, whose configuration has the pattern.

    Args:
        module: of the attention.
        query: ``(B, H, n, D)``.
        key, value: ``(B, Hkv, m, D)``; with ``n < m``, queries are the last tokens.
        attention_mask: ``(B, m)``, true for tokens; padding stands before or behind them. None: no padding.
        dropout: must be 0.
        scaling: factor of the scores.
        is_causal: as the module's, if not given.
        s_aux: ``(H,)``, a sink for each head.
        position_ids: ``(B, n)``; where they do not grow by 1, a packed document begins.
        cu_seq_lens_k: edges of packed documents, ``(documents + 1,)``.
        sequence_slice: which tokens of the sequence these are, of a sequence-parallel model; it has the documents.
        others: of transformers; what changes the mathematics is refused.

    Returns:
        ``(B, n, H, D)``, and None for the weights.

    Raises:
        ConfigError, ShapeError: what dilated attention does not compute.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    _check(module, query, key, attention_mask, dropout, causal, others)
    _check_whole(module.config, query, key, position_ids)
    layer = layer_of(key)
    query, key, value = _of_one_dtype(query, key, value)
    sink = None if s_aux is None else s_aux.float()
    if layer is not None:
        return layer.attend(query, key, value, scaling, sink, attention_mask), None
    pattern = pattern_of(module.config)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if sequence_slice is not None:
        return sequence_slice.attend(query, key, value, pattern, causal=causal, scale=scaling, sink=sink), None
    out = attend_documents(
        query,
        key,
        value,
        pattern,
        causal=causal,
        scale=scaling,
        sink=sink,
        mask=attention_mask,
        position_ids=position_ids if position_ids is not None and position_ids.dim() == 2 else None,
        cu_seqlens=cu_seq_lens_k,
    )
    return out, None


def _check(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    causal: bool,
    others: dict[str, Any],
) -> None:
    for name, what in _REFUSED.items():
        if others.get(name) is not None:
            raise ConfigError(f"dilated attention has not {what}, but {name}={others[name]}")
    if dropout:
        raise ConfigError(
            f"dilated attention has no dropout of attention weights, but dropout is {dropout}; set attention_dropout "
            f"or attention_probs_dropout_prob of the configuration to 0"
        )
    if others.get("output_attentions"):
        raise ConfigError("dilated attention never has its weights; leave output_attentions out")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ShapeError(
            f"dilated attention takes a mask of padding (batch, tokens), not {attention_mask.dim()} dimensions "
            f"{tuple(attention_mask.shape)}"
        )
    if not causal and query.shape[2] != key.shape[2]:
        raise ShapeError(
            f"bidirectional attention needs as many queries as keys, not {query.shape[2]} and {key.shape[2]}; there is "
            f"no cross-attention"
        )


def _check_whole(config: Any, query: Tensor, key: Tensor, position_ids: Tensor | None) -> None:
    """Raise ConfigError where another library has split heads or positions over ranks."""
    heads = getattr(config, "num_attention_heads", query.shape[1])
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if (query.shape[1], key.shape[1]) != (heads, kv_heads):
        raise ConfigError(
            f"head offsets count all {heads} heads and {kv_heads} key/value heads of the model, but this call has "
            f"{query.shape[1]} and {key.shape[1]}; do not split heads over ranks (tensor parallelism, Ulysses), but "
            f"sequences: longnet_dist.hf.sequence_parallel(model, group)"
        )
    if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] != query.shape[2]:
        raise ConfigError(
            f"position_ids must be those of the {query.shape[2]} queries, but are {position_ids.shape[1]}; do not "
            f"split positions over ranks, but call longnet_dist.hf.sequence_parallel(model, group)"
        )


def _of_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors in one dtype: under autocast its own, else the one that holds all."""
    device = tensors[0].device.type
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return [tensor.to(dtype) for tensor in tensors]
