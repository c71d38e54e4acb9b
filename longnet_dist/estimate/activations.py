"""A block's activations take memory twice: some are saved for backward, others exist only while it is computed.

A token passes ``x → norm → q, k, v → attention → norm → out_proj → y → norm → fc1 → gelu → norm → fc2`` in a block. In
place of the GELU, a gated feed-forward network multiplies the SiLU of one half of ``fc1`` by the other half.
Autograd saves the result of every arrow except those of ``out_proj`` and ``fc2``, which are only added to the residual
stream.
"""

from __future__ import annotations

from longnet_dist.config.hf_model import HuggingFaceConfig
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.model_cost import block_parameters

WIDE = 4  # bytes of a float32
SDPA_BLOCK_NUMBERS = 1 << 22  # numbers of a block of queries in attention/kernels/backends/sdpa.py
SINK_TILE = 1 << 16  # tokens of a tile in attention/sink.py
_AFTER_ATTENTION = ("norm_out", "y", "norm2", "fc1", "gelu", "norm3")


def saved_by_block(layout: RunLayout) -> int:
    """Return the bytes that a block saves from forward to backward, on the device or offloaded, for a micro-batch."""
    mode, tensors = layout.config.train.activation_checkpointing, _tensors(layout)
    if isinstance(layout.config.model, HuggingFaceConfig) and mode == "none":
        return layout.local_tokens * sum(tensors.values())
    saved = {"none": list(tensors), "selective": ["x", "out", "lse"], "full": ["x"]}[mode]
    return layout.local_tokens * sum(tensors[name] for name in saved)


def saved_qkv(layout: RunLayout) -> int:
    """Return the bytes of queries, keys and values that a block saves in addition with ``train.cache_qkv``."""
    return layout.local_tokens * _qkv(layout)


def backward_peak_of_block(layout: RunLayout) -> int:
    """Return the peak of the bytes in the backward of the last block, beyond what all blocks have saved."""
    if isinstance(layout.config.model, HuggingFaceConfig):
        return _peak_of_transformers(layout)
    if layout.config.train.activation_checkpointing == "none":
        return _peak_with_autograd(layout)
    return _peak_with_checkpointing(layout)


def _peak_with_autograd(layout: RunLayout) -> int:
    """Return the peak where autograd has saved everything, so that only gradients are added.

    The largest of two moments: in the feed-forward, while everything saved is still there; and in the attention, when
    what the feed-forward had saved is free again, but the attention needs float32 sums.
    """
    model, itemsize, tokens, tensors = layout.config.model, layout.itemsize, layout.local_tokens, _tensors(layout)
    width = model.dim * itemsize
    freed = sum(tensors[name] for name in _AFTER_ATTENTION)
    in_attention = 2 * width + attention_backward_bytes(layout) - freed
    return tokens * max(width + model.inner_dim * itemsize, in_attention)


def _peak_with_checkpointing(layout: RunLayout) -> int:
    """Return the peak where the engine recomputes (``engine/block_run.py``): gradients and recomputed activations.

    The largest of three moments, in the order of backward: after the attention (row-wise parts, one tile of tokens at a
    time), in it, and before it (one tile at a time again).
    """
    model, itemsize, tokens, tensors = layout.config.model, layout.itemsize, layout.local_tokens, _tensors(layout)
    tile = min(layout.config.train.feed_forward_tile or tokens, tokens)
    width, inner = model.dim * itemsize, (model.first_dim + model.inner_dim) * itemsize
    qkv = _qkv(layout)
    recomputed_qkv = 0 if layout.config.train.cache_qkv else qkv
    full = layout.config.train.activation_checkpointing == "full"
    attended = tensors["out"] + tensors["lse"] if full else 0
    # Compiled code does not store the five results of the model's width between row-wise operations, nor one factor
    # of the product in a gated network.
    factor = (model.first_dim - model.inner_dim) * itemsize
    after = sum(tensors[name] for name in _AFTER_ATTENTION) + inner + (0 if layout.compiled else 5 * width + factor)
    before = tensors["norm1"] + 2 * qkv + 2 * model.dim * WIDE  # RoPE computes in float32
    gradients = attention_backward_bytes(layout)
    # On a GPU, the output and the LSE are freed once their statistics are computed.
    freed = tensors["out"] + tensors["lse"] if layout.device_type == "cuda" else 0
    weights = block_parameters(model)
    return max(
        tokens * (3 * width + attended + (qkv if full else 0)) + tile * after + weights * WIDE,
        tokens * (2 * width + attended - freed + recomputed_qkv + gradients) + weights * itemsize,
        tokens * (width + _gradients(layout)) + tile * before + weights * WIDE,
    )


def _peak_of_transformers(layout: RunLayout) -> int:
    """Return the peak in a block of transformers: what is recomputed, and gradients in feed-forward or attention."""
    train, model, tokens, itemsize = layout.config.train, layout.config.model, layout.local_tokens, layout.itemsize
    recomputed = 0 if train.activation_checkpointing == "none" else tokens * sum(_tensors(layout).values())
    tile = min(train.feed_forward_tile or tokens, tokens)
    # The gradients of the product, of its two factors and of the activation; a tile is recomputed before.
    inner = tile * (4 if tile == tokens else 8) * model.inner_dim * itemsize
    rows = tokens * 3 * model.dim * itemsize
    return (
        recomputed + rows + max(inner, tokens * attention_backward_bytes(layout)) + block_parameters(model) * itemsize
    )


def attention_backward_bytes(layout: RunLayout) -> int:
    """Return the bytes for each token in the backward of attention: gradients of q, k, v, and wider sums of them.

    On a GPU (``attention/kernels/triton``) only dQ has a float32 sum. Where it is rounded into a tensor of the run's
    precision, the statistics of the queries use that tensor as scratch. A checkpointed block takes the float32 sum
    itself, so the statistics need memory of their own. On a CPU (``attention/kernels/backends/sdpa.py``) all sums are
    float32, and the tokens of one block have theirs twice.
    """
    model, itemsize = layout.config.model, layout.itemsize
    gradients = _gradients(layout) + _sink_gradient(layout)
    if layout.device_type == "cuda":
        return gradients + WIDE * (model.query_dim if _copies_dq(layout) else 2 * model.heads)
    numbers = model.query_dim + 2 * model.key_dim
    block = min(1.0, SDPA_BLOCK_NUMBERS / (layout.local_tokens * model.query_dim))
    wide = numbers * WIDE if itemsize < WIDE else 0
    return gradients + wide + int(block * numbers * itemsize) + WIDE * model.heads


def _sink_gradient(layout: RunLayout) -> int:
    """Return the bytes for each token of delta and the gradient of sinks, which sums products tile by tile."""
    model = layout.config.model
    if not model.sinks:
        return 0
    copies = 3 if layout.itemsize < WIDE else 1  # both factors, wide, and their product
    tile = min(1.0, SINK_TILE / layout.local_tokens)
    return 3 * model.heads * WIDE + int(tile * copies * model.dim * WIDE)


def _qkv(layout: RunLayout) -> int:
    """Return the bytes of queries, keys and values for each token."""
    tensors = _tensors(layout)
    return tensors["q"] + tensors["k"] + tensors["v"]


def _gradients(layout: RunLayout) -> int:
    """Return the bytes for each token of the gradients of q, k and v that the backward of attention returns."""
    model, itemsize = layout.config.model, layout.itemsize
    wide = layout.device_type == "cuda" and not _copies_dq(layout)
    return model.query_dim * (WIDE if wide else itemsize) + 2 * model.key_dim * itemsize


def _copies_dq(layout: RunLayout) -> bool:
    """Say whether dQ is rounded from its float32 sum into a tensor of the run's precision, on a GPU."""
    train = layout.config.train
    autograd = train.activation_checkpointing == "none" or isinstance(layout.config.model, HuggingFaceConfig)
    return layout.itemsize < WIDE and autograd


def _tensors(layout: RunLayout) -> dict[str, int]:
    """Return the bytes for each token of every tensor that the autograd graph of a block saves, by name.

    A LayerNorm saves its mean and its inverse deviation too, both float32. Compiled code does not save the output of
    the GELU or the gated product: it is recomputed from ``fc1`` wherever it is read.
    """
    model, itemsize = layout.config.model, layout.itemsize
    if isinstance(model, HuggingFaceConfig):
        return _tensors_of_transformers(layout, model)
    width, keys, inner = model.dim * itemsize, model.key_dim * itemsize, model.inner_dim * itemsize
    first = model.first_dim * itemsize
    statistics = 2 * WIDE
    return {
        "x": width,
        "norm1": width + statistics,
        "q": width,
        "k": keys,
        "v": keys,
        **_head_norms(layout),
        "out": width,
        "lse": model.heads * WIDE,
        "norm_out": width + statistics,
        "y": width,
        "norm2": width + statistics,
        "fc1": first,
        "gelu": 0 if layout.compiled else first,  # gated: the SiLU and the product
        "norm3": inner + statistics,
    }


def _tensors_of_transformers(layout: RunLayout, model: HuggingFaceConfig) -> dict[str, int]:
    """Return the bytes for each token of what a block of transformers saves.

    An RMSNorm saves its input in float32, the normed rows, and what the linear layers behind it read. Rotations save
    nothing of the rows. A feed-forward network in tiles saves its input alone.
    """
    itemsize, train = layout.itemsize, layout.config.train
    queries, keys = model.query_dim * itemsize, model.key_dim * itemsize
    norm = model.dim * (WIDE + 2 * itemsize) + WIDE
    tiled = train.feed_forward_tile is not None and train.feed_forward_tile < layout.local_tokens
    heads = (model.query_dim + model.key_dim) * (WIDE + itemsize) if model.transformers.model_type == "qwen3" else 0
    return {
        "x": 0 if train.activation_checkpointing == "none" else model.dim * itemsize,
        "norm1": norm,
        "qk_norm": heads,
        "q": queries,
        "k": keys,
        "v": keys,
        "out": queries,
        "lse": model.heads * WIDE,
        "norm2": norm,
        "feed_forward": 0 if tiled else 4 * model.inner_dim * itemsize,
    }


def _head_norms(layout: RunLayout) -> dict[str, int]:
    """Return the bytes for each token that the RMSNorms of queries and keys save.

    On a GPU these are their inputs and a float32 number for each head. On a CPU torch composes the norm of smaller
    operations, which save float32 tensors.
    """
    model = layout.config.model
    if not model.qk_norm:
        return {}
    numbers = model.dim + model.key_dim
    if layout.device_type == "cpu":
        return {"qk_norm": 2 * numbers * WIDE}
    return {"qk_norm": numbers * layout.itemsize + (model.heads + model.key_dim // model.head_dim) * WIDE}
