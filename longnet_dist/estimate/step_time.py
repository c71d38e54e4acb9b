"""The time of a step is estimated by part: FLOPs and bytes divided by the rates of the device."""

from __future__ import annotations

from longnet_dist.config.hf_model import HuggingFaceConfig
from longnet_dist.estimate.activations import WIDE
from longnet_dist.estimate.devices import Device
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.memory import offloaded_bytes
from longnet_dist.estimate.model_cost import block_matrix_weights, num_parameters, pattern_flops
from longnet_dist.estimate.network import Network
from longnet_dist.estimate.traffic import exchange_of
from longnet_dist.geometry.overlap import computed_share
from longnet_dist.numerics import block_dim

# Tensors that row-wise work reads or writes for each token: of the model's width; and between the linear layers of the
# feed-forward network, each as wide as the output of the first or the input of the last.
# Forward: two norms 2 each, RoPE 4, the residual sum with its norm 4; GELU with its norm reads the one and writes the
# other. Backward: norms 3, 5 and 5, zeroing dQ 2, concatenating the gradients of q, k and v 7; GELU with its norm reads
# both and writes both gradients.
FORWARD_PASSES = (12, 1)
BACKWARD_PASSES = (22, 2)
# The share of forward in the computation of a step; the rest is backward with what it recomputes.
FORWARD_SHARE = 0.28
# Those of FORWARD_PASSES that recomputing q, k and v costs: a norm and RoPE.
QKV_PASSES = 6
# The shortest backward of attention takes this many times the shortest forward: attention_speed.json.
ATTENTION_BACKWARD = 1.7
# Without torch.compile, intermediate results are written and read too: benchmarks/results/training_h100.md.
EAGER = 3.1
# A logit and its gradient are each written once and read twice.
LOGIT_PASSES = 6
# For each chunk of logits, the gradient of the output projection is written and read (one pass each), and its float32
# sum read and written (two passes each).
LOGIT_SUM_PASSES = 6
# Bytes that an update reads or writes for a sharded parameter: gradient, norm, clipping, moments, master weight.
UPDATE_BYTES = 50
# AdamW on the cores of the host.
HOST_UPDATE_BYTES_PER_SECOND = 30e9


def step_seconds(layout: RunLayout, device: Device) -> dict[str, float]:
    """Estimate the seconds of each part of an optimizer step on one rank.

    Args:
        layout: how the run is split over ranks.
        device: the device of each rank.

    Returns:
        seconds by part, which add up to the step; empty if the speed of the device is unknown.
    """
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
    seconds["exchange"] = _exchange_seconds(layout, device, seconds["attention"])
    seconds["update"] = _update_seconds(layout, device)
    seconds["fixed"] = rates.step_seconds
    return seconds


def _tokens(layout: RunLayout) -> float:
    """Return the tokens that a rank trains in a step."""
    sequences = layout.micro_batch_size * layout.accumulation
    return layout.config.data.sequence_length / layout.mesh.sequence * sequences


def _extra_forwards(layout: RunLayout) -> float:
    """Return the additional forwards of a streamed step: all chunks but the last are computed twice."""
    return (layout.num_chunks - 1) / layout.num_chunks


def _recomputed_blocks(layout: RunLayout) -> tuple[float, float]:
    """Return the number of blocks that recompute q, k, v, and of those that recompute what follows the attention."""
    train, layers = layout.config.train, layout.config.model.layers
    if train.activation_checkpointing == "none":
        return 0, 0
    return layers - min(layers, train.cache_qkv), layers


def _matmul_flops(layout: RunLayout) -> float:
    """Return the FLOPs of all matmuls of a step, with those that are recomputed.

    The last matmul of a block, ``fc2``, is not recomputed: no gradient needs its result. A block of transformers is
    recomputed whole, and its tiles once more.
    """
    model = layout.config.model
    with_qkv, with_rest = _recomputed_blocks(layout)
    qkv = model.dim * (model.query_dim + 2 * model.key_dim)
    recomputed = with_qkv * qkv + with_rest * model.dim * (model.query_dim + model.first_dim)
    if isinstance(model, HuggingFaceConfig):
        tiled = layout.config.train.feed_forward_tile is not None
        recomputed = with_rest * block_matrix_weights(model) + tiled * model.layers * 3 * model.dim * model.inner_dim
    blocks = model.layers * block_matrix_weights(model) * (6 + 2 * _extra_forwards(layout)) + 2 * recomputed
    head = model.num_outputs * model.dim * 6  # the loss computes its gradients in forward, so nothing is recomputed
    return _tokens(layout) * (blocks + head)


def _attention_seconds(layout: RunLayout, device: Device, peak: float) -> float:
    model, rates = layout.config.model, device.rates
    sequences = layout.micro_batch_size * layout.accumulation / layout.mesh.sequence
    length = layout.config.data.sequence_length
    flops = 0.0
    for pattern, number in model.pattern_counts.items():
        heads = model.kv_heads or model.heads
        share = computed_share(pattern, length, heads, model.causal) if layout.merges_overlaps else 1.0
        flops += number * pattern_flops(model, pattern, length) * sequences * share
    forwards = 1 + (layout.config.train.activation_checkpointing == "full") + _extra_forwards(layout)
    if layout.device_type == "cuda":
        flops *= block_dim(model.head_dim) / model.head_dim  # kernels pad the head dim
    wide = rates.wide_heads if model.head_dim > 64 else 1.0
    fixed = model.layers * layout.passes * rates.attention_seconds * (forwards + ATTENTION_BACKWARD)
    return flops * (forwards / rates.attention_forward + 2.5 / rates.attention_backward) / (peak * wide) + fixed


def _row_wise_bytes(layout: RunLayout) -> float:
    model, forwards = layout.config.model, 1 + _extra_forwards(layout)
    with_qkv, with_rest = (blocks / model.layers for blocks in _recomputed_blocks(layout))
    recomputed = with_qkv * QKV_PASSES + with_rest * (FORWARD_PASSES[0] - QKV_PASSES)
    width = FORWARD_PASSES[0] * forwards + recomputed + BACKWARD_PASSES[0]
    inner = FORWARD_PASSES[1] * forwards + BACKWARD_PASSES[1]
    blocks = model.layers * (width * model.dim + inner * (model.first_dim + model.inner_dim)) * layout.itemsize
    sums = LOGIT_SUM_PASSES * model.dim / min(model.logits_rows, layout.local_tokens)
    logits = model.num_outputs * (LOGIT_PASSES + sums) * layout.itemsize
    return _tokens(layout) * (blocks + logits) * (1 if layout.compiled else EAGER)


def _offload_seconds(layout: RunLayout, device: Device, computing: float) -> float:
    """Return how long forward waits for copies to the host, beyond the computation that they overlap with.

    Backward copies as much back, but takes longer than forward, so it does not wait.
    """
    moved = offloaded_bytes(layout) * layout.passes
    return max(0.0, moved / (device.host_link * device.rates.host_link) - FORWARD_SHARE * computing)


def _exchange_seconds(layout: RunLayout, device: Device, attention: float) -> float:
    """Return the time of the exchanges beyond the computation that they overlap with.

    Args:
        layout: how the run is split over ranks.
        device: the device of each rank.
        attention: seconds of the attention of a step, of which a layer's part runs during its exchange.
    """
    network, calls = Network.of(device), layout.config.model.layers * layout.passes
    exchange = exchange_of(layout, device.gpus_per_host)
    if not exchange.collectives:
        return 0.0
    forward, ranks = layout.itemsize / (layout.itemsize + WIDE), layout.mesh.sequence
    far = exchange.bytes * exchange.distant / max(1, exchange.foreign)
    exposed = 0.0
    for share, computing in ((forward, FORWARD_SHARE), (1 - forward, 1 - FORWARD_SHARE)):
        seconds = network.exchange_seconds(share * (exchange.bytes - far), share * far, ranks)
        latency = network.exchange_seconds(0, 0, ranks)
        hidden = computing * attention / calls if layout.config.parallel.overlap else 0.0
        exposed += latency + max(0.0, seconds - latency - hidden)
    return calls * exposed


def _update_seconds(layout: RunLayout, device: Device) -> float:
    """Return the time to reduce the gradients, update them, and gather the new weights."""
    number, ranks, stage = num_parameters(layout.config.model), layout.num_ranks, layout.config.deepspeed.zero_stage
    shard = number / ranks if stage else number
    memory = (shard * UPDATE_BYTES + number * (WIDE + layout.itemsize)) / (device.bandwidth * device.rates.bandwidth)
    gathers = 2 * layout.passes if stage == 3 else 1
    network = Network.of(device)
    travel = network.ring_seconds(number * 2 * WIDE, ranks) + gathers * network.ring_seconds(
        number * layout.itemsize, ranks
    )
    if not layout.config.deepspeed.offload_optimizer:
        return memory + travel
    copies = shard * (WIDE + layout.itemsize) / (device.host_link * device.rates.host_link)
    return travel + copies + shard * UPDATE_BYTES / HOST_UPDATE_BYTES_PER_SECOND
