"""Seconds of a step by part: FLOPs and bytes over the rates of the device."""

from __future__ import annotations

from longnet_dist.estimate.activations import WIDE
from longnet_dist.estimate.devices import Device
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.memory import offloaded_bytes
from longnet_dist.estimate.model_cost import (
    attention_flops,
    block_matrix_weights,
    inner_dim,
    key_dim,
    num_parameters,
)
from longnet_dist.estimate.traffic import exchange_of
from longnet_dist.geometry.overlap import computed_share
from longnet_dist.numerics import block_dim

# Tensors of a row that row-wise work reads and writes: (of the model's width, of the inner width).
# Forward: two norms 2 each, positions 4, a sum with its norm 4; gelu with its norm 2. Backward: norms 3, 5 and 5, the
# zeros of dQ 2, gradients of q, k, v side by side 7; gelu with its norm 4.
FORWARD_PASSES = (12, 2)
BACKWARD_PASSES = (22, 4)
FORWARD_SHARE = 0.28  # of the computation of a step; the rest is backward, with what it computes again
PROJECTION_PASSES = 6  # of the forward's: a norm and positions
ATTENTION_BACKWARD = 1.7  # what a backward of attention takes at least, over a forward: attention_speed.json
EAGER = 3.1  # without torch.compile intermediate results travel, too; from benchmarks/results/training_h100.md
LOGIT_PASSES = 6  # of a logit and its gradient, each written once and read twice
LOGIT_SUM_PASSES = (
    6  # of the output projection, a chunk: its gradient written and read, their float32 sum read and written
)
UPDATE_BYTES = 50  # of a sharded parameter: gradient, its norm, clipping, moments, master weight
HOST_UPDATE_BYTES_PER_SECOND = 30e9  # AdamW on the processors of the host


def step_seconds(layout: RunLayout, device: Device) -> dict[str, float]:
    """Seconds of each part of an optimizer step on one rank; empty where the device's speed is unknown."""
    tflops = device.bf16_tflops if layout.precision == "bf16" else device.fp32_tflops
    if tflops is None:
        return {}
    peak, rates = 1e12 * tflops, device.rates
    seconds = {
        "matmul": _matmul_flops(layout) / (peak * rates.matmul),
        "attention": _attention_seconds(layout, device, peak),
        "row-wise": _row_wise_bytes(layout) / (device.bandwidth * rates.bandwidth),
    }
    computing = sum(seconds.values())
    seconds["offload"] = _offload_seconds(layout, device, computing)
    seconds["exchange"] = _exchange_seconds(layout, device)
    seconds["update"] = _update_seconds(layout, device)
    seconds["fixed"] = rates.step_seconds
    return seconds


def _rows(layout: RunLayout) -> float:
    """Rows of a step on a rank."""
    sequences = layout.micro_batch_size * layout.accumulation
    return layout.config.data.sequence_length / layout.mesh.sequence * sequences


def _recorded(layout: RunLayout) -> float:
    """Forwards of a streamed step beyond the first: all chunks but the last pass twice."""
    return (layout.num_chunks - 1) / layout.num_chunks


def _again(layout: RunLayout) -> tuple[float, float]:
    """How many blocks compute their projections, and what comes behind the attention, again in backward."""
    train, layers = layout.config.train, layout.config.model.layers
    if train.activation_checkpointing == "none":
        return 0, 0
    return layers - min(layers, train.cache_qkv), layers


def _matmul_flops(layout: RunLayout) -> float:
    """Of a step; what is computed again leaves out the last product of a block, which no gradient needs."""
    model = layout.config.model
    projections, behind = _again(layout)
    qkv = model.dim * (model.dim + 2 * key_dim(model))
    again = projections * qkv + behind * model.dim * (model.dim + inner_dim(model))
    blocks = model.layers * block_matrix_weights(model) * (6 + 2 * _recorded(layout)) + 2 * again
    head = model.vocab_size * model.dim * 6  # the loss makes its gradients in forward
    return _rows(layout) * (blocks + head)


def _attention_seconds(layout: RunLayout, device: Device, peak: float) -> float:
    model, rates = layout.config.model, device.rates
    sequences = layout.micro_batch_size * layout.accumulation / layout.mesh.sequence
    length = layout.config.data.sequence_length
    flops = model.layers * attention_flops(model, length) * sequences
    if layout.merges_overlaps:
        flops *= computed_share(model.pattern, length, model.kv_heads or model.heads, model.causal)
    forwards = 1 + (layout.config.train.activation_checkpointing == "full") + _recorded(layout)
    if layout.device_type == "cuda":
        flops *= block_dim(model.head_dim) / model.head_dim
    wide = rates.wide_heads if model.head_dim > 64 else 1.0
    begun = model.layers * layout.passes * rates.attention_seconds * (forwards + ATTENTION_BACKWARD)
    return flops * (forwards / rates.attention_forward + 2.5 / rates.attention_backward) / (peak * wide) + begun


def _row_wise_bytes(layout: RunLayout) -> float:
    model, forwards = layout.config.model, 1 + _recorded(layout)
    projections, behind = (blocks / model.layers for blocks in _again(layout))
    again = projections * PROJECTION_PASSES + behind * (FORWARD_PASSES[0] - PROJECTION_PASSES)
    width = FORWARD_PASSES[0] * forwards + again + BACKWARD_PASSES[0]
    inner = FORWARD_PASSES[1] * forwards + BACKWARD_PASSES[1]
    blocks = model.layers * (width * model.dim + inner * inner_dim(model)) * layout.itemsize
    sums = LOGIT_SUM_PASSES * model.dim / min(model.logits_rows, layout.local_rows)
    logits = model.vocab_size * (LOGIT_PASSES + sums) * layout.itemsize
    return _rows(layout) * (blocks + logits) * (1 if layout.compiled else EAGER)


def _offload_seconds(layout: RunLayout, device: Device, computing: float) -> float:
    """What copies to the host take beyond the forward that they run beside; the backward has more time for as much."""
    moved = offloaded_bytes(layout) * layout.passes
    return max(0.0, moved / (device.host_link * device.rates.host_link) - FORWARD_SHARE * computing)


def _exchange_seconds(layout: RunLayout, device: Device) -> float:
    """Exchanges of rows: what their latency exposes, and their bytes if they do not run beside the computation."""
    exchange = exchange_of(layout)
    exposed = 0.0 if layout.config.parallel.overlap else exchange.bytes / device.link
    latency = exchange.collectives * device.rates.collective_seconds
    return layout.config.model.layers * layout.passes * (exposed + latency)


def _update_seconds(layout: RunLayout, device: Device) -> float:
    """Reduction of gradients, AdamW, and the new weights' way to all ranks."""
    number, ranks, stage = num_parameters(layout.config.model), layout.num_ranks, layout.config.deepspeed.zero_stage
    shard = number / ranks if stage else number
    memory = (shard * UPDATE_BYTES + number * (WIDE + layout.itemsize)) / (device.bandwidth * device.rates.bandwidth)
    gathers = 2 * layout.passes if stage == 3 else 1
    travel = number * (2 * WIDE + gathers * layout.itemsize) * (ranks - 1) / ranks / device.link
    if not layout.config.deepspeed.offload_optimizer:
        return memory + travel
    copies = shard * (WIDE + layout.itemsize) / (device.host_link * device.rates.host_link)
    return travel + copies + shard * UPDATE_BYTES / HOST_UPDATE_BYTES_PER_SECOND
