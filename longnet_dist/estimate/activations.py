"""Bytes of a block's activations: what it keeps for backward, and what it holds while it is computed.

A row of a block passes ``x → norm → q, k, v → attention → norm → projection → y → norm → fc1 → gelu → norm → fc2``;
every arrow's end is a tensor that autograd keeps, except the two projections that are only added.
"""

from __future__ import annotations

from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.model_cost import block_parameters, inner_dim, key_dim

WIDE = 4  # bytes of a float32
SDPA_BLOCK_NUMBERS = 1 << 22  # as kernels/sdpa.py cuts its views
_BEHIND = ("norm_out", "y", "norm2", "fc1", "gelu", "norm3")  # the attention


def kept_by_block(layout: RunLayout) -> int:
    """Bytes that a block keeps from forward to backward, on the device or offloaded, for the rows of a micro-batch."""
    mode, tensors = layout.config.train.activation_checkpointing, _tensors(layout)
    kept = {"none": list(tensors), "selective": ["x", "out", "lse"], "full": ["x"]}[mode]
    return layout.local_rows * sum(tensors[name] for name in kept)


def projections_kept(layout: RunLayout) -> int:
    """Bytes of queries, keys and values that a block keeps as well where ``train.cache_qkv`` says so."""
    return layout.local_rows * _projections(layout)


def held_by_block(layout: RunLayout) -> int:
    """Bytes that the backward of the last block holds at most beyond what all blocks keep."""
    if layout.config.train.activation_checkpointing == "none":
        return _held_by_autograd(layout)
    return _held_by_checkpointing(layout)


def _held_by_autograd(layout: RunLayout) -> int:
    """Gradients on their way.

    Two moments can be the largest: within the feed-forward, when the whole block is there, and within the attention,
    when the feed-forward has been differentiated and attention has float32 sums of its own.
    """
    model, itemsize, rows, tensors = layout.config.model, layout.itemsize, layout.local_rows, _tensors(layout)
    width = model.dim * itemsize
    behind = sum(tensors[name] for name in _BEHIND)
    in_attention = 2 * width + attention_backward_bytes(layout) - behind
    return rows * max(width + inner_dim(model) * itemsize, in_attention)


def _held_by_checkpointing(layout: RunLayout) -> int:
    """Gradients on their way and what is computed again (model/checkpointing.py), row-wise parts a tile at a time.

    The largest of three moments: behind the attention, within it, before it. Compiled, results of the model's width on
    their way to the next are not stored.
    """
    model, itemsize, rows, tensors = layout.config.model, layout.itemsize, layout.local_rows, _tensors(layout)
    tile = min(layout.config.train.feed_forward_tile or rows, rows)
    width, inner = model.dim * itemsize, inner_dim(model) * itemsize
    projections = _projections(layout)
    made = 0 if layout.config.train.cache_qkv else projections  # in the attention
    full = layout.config.train.activation_checkpointing == "full"
    attended = tensors["out"] + tensors["lse"] if full else 0
    behind = sum(tensors[name] for name in _BEHIND) + 2 * inner + (0 if layout.compiled else 5 * width)
    before = tensors["norm1"] + 2 * projections + 2 * model.dim * WIDE  # positions are float32
    # A GPU's kernel needs no output once it has its statistics.
    gradients = attention_backward_bytes(layout)
    forgotten = tensors["out"] + tensors["lse"] if layout.device_type == "cuda" else 0
    weights = block_parameters(model)
    return max(
        rows * (3 * width + attended + (projections if full else 0)) + tile * behind + weights * WIDE,
        rows * (2 * width + attended - forgotten + made + gradients) + weights * itemsize,
        rows * (width + _gradients(layout)) + tile * before + weights * WIDE,
    )


def attention_backward_bytes(layout: RunLayout) -> int:
    """Bytes a row that the backward of attention holds: gradients of q, k, v, and their sums where these are wider.

    On a GPU (kernels/triton_kernel.py) dQ alone is summed apart, in float32; its statistics of the rows stand in the
    room of the result, or apart where a checkpointed block takes dQ as it was summed. On a CPU (kernels/sdpa.py) all
    sums are float32, and as many rows as fill a block have theirs twice.
    """
    model, itemsize = layout.config.model, layout.itemsize
    gradients = _gradients(layout)
    if layout.device_type == "cuda":
        return gradients + WIDE * (model.dim if _copies_dq(layout) else 2 * model.heads)
    numbers = model.dim + 2 * key_dim(model)
    block = min(1.0, SDPA_BLOCK_NUMBERS / (layout.local_rows * model.dim))
    wide = numbers * WIDE if itemsize < WIDE else 0
    return gradients + wide + int(block * numbers * itemsize) + WIDE * model.heads


def _projections(layout: RunLayout) -> int:
    """Bytes a row of queries, keys and values."""
    tensors = _tensors(layout)
    return tensors["q"] + tensors["k"] + tensors["v"]


def _gradients(layout: RunLayout) -> int:
    """Bytes a row of the gradients of q, k, v as the attention's backward leaves them."""
    model, itemsize = layout.config.model, layout.itemsize
    wide = layout.device_type == "cuda" and not _copies_dq(layout)
    return model.dim * (WIDE if wide else itemsize) + 2 * key_dim(model) * itemsize


def _copies_dq(layout: RunLayout) -> bool:
    """Whether a GPU's dQ is copied from its float32 sums into the precision of the run."""
    return layout.itemsize < WIDE and layout.config.train.activation_checkpointing == "none"


def _tensors(layout: RunLayout) -> dict[str, int]:
    """Bytes a row of every tensor that a block's autograd graph keeps; a norm also keeps two float32 numbers a row.

    Compiled, the feed-forward's gelu is made from its input wherever it is read.
    """
    model, itemsize = layout.config.model, layout.itemsize
    width, keys, inner = model.dim * itemsize, key_dim(model) * itemsize, inner_dim(model) * itemsize
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
        "fc1": inner,
        "gelu": 0 if layout.compiled else inner,
        "norm3": inner + statistics,
    }


def _head_norms(layout: RunLayout) -> dict[str, int]:
    """What the RMSNorms of queries and keys keep: their inputs; on a CPU torch makes them of parts, in float32."""
    model = layout.config.model
    if not model.qk_norm:
        return {}
    numbers = model.dim + key_dim(model)
    if layout.device_type == "cpu":
        return {"qk_norm": 2 * numbers * WIDE}
    return {"qk_norm": numbers * layout.itemsize + (model.heads + key_dim(model) // model.head_dim) * WIDE}
