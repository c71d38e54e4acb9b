"""The peak memory of a rank is estimated by part, at each moment of a step that can be the largest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.config.hf_model import HuggingFaceConfig
from longnet_dist.estimate.activations import (
    WIDE,
    attention_backward_bytes,
    backward_peak_of_block,
    saved_by_block,
    saved_qkv,
)
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.model_cost import num_parameters, optimizer_numbers
from longnet_dist.estimate.state import state_of
from longnet_dist.estimate.traffic import Exchange, exchange_of
from longnet_dist.geometry.chunks import cache_rows, record_rows
from longnet_dist.geometry.position_encodings import POSITION_ENCODINGS

HOST_PROCESS_BYTES = 4 * 2**30  # of a process with CUDA and all libraries loaded
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Memory:
    """A Memory is the estimated peak of a rank, by part, in bytes.

    Attributes:
        moment: when the peak is reached: ``loss``, ``last block`` or ``first block`` (of backward), or ``update``.
        device: bytes of each part at that moment, as torch's allocator counts them.
        host: bytes of each part in host memory, not counting a CPU rank's tensors.
        in_parts: whether each rank has its part of ``CHECKPOINT``; else only rank 0 has it.
    """

    moment: str
    device: Mapping[str, int]
    host: Mapping[str, int]
    in_parts: bool = False

    @property
    def device_bytes(self) -> int:
        """Return the sum of all parts on the device."""
        return sum(self.device.values())

    def host_parts(self, local_ranks: int) -> dict[str, int]:
        """Return the host's parts, summed over the ``local_ranks`` ranks of a machine."""
        alone = () if self.in_parts else (CHECKPOINT,)
        return {name: size * (1 if name in alone else local_ranks) for name, size in self.host.items()}


def memory_of(layout: RunLayout) -> Memory:
    """Estimate the peak memory of the rank that needs most."""
    moments = _moments(layout)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Memory(moment, moments[moment], _host(layout), _in_parts(layout))


def _moments(layout: RunLayout) -> dict[str, dict[str, int]]:
    """Return the bytes of each part, for each moment that can be the peak."""
    model, state, tokens = layout.config.model, state_of(layout), layout.local_tokens
    exchange = exchange_of(layout)
    always = {"parameters": state.parameters, "optimizer": state.optimizer} | _always(layout)
    computing = always | {"parameters": state.parameters + state.gathered}
    saved, peak = saved_by_block(layout), backward_peak_of_block(layout)
    train = layout.config.train
    resident = max(train.resident, train.least_resident) if train.offload_activations else model.layers
    with_qkv = min(train.cache_qkv, model.layers)
    resident_qkv = max(with_qkv - train.offload_qkv, min(with_qkv, resident))
    all_saved = min(model.layers, resident) * saved + resident_qkv * saved_qkv(layout)
    first_saved = saved + (with_qkv == model.layers) * saved_qkv(layout)
    attention = min(peak, tokens * attention_backward_bytes(layout))
    block = {"block": peak - attention, "attention": attention, "exchange": _in_flight(layout, exchange)}
    gathered = _gathered(layout, exchange)
    head_gradient = model.num_outputs * model.dim * layout.itemsize
    return {
        "loss": computing
        | {"gradients": state.gradients_before, "activations": all_saved, "logits": _logits(layout)}
        | {"exchange": model.layers * gathered},
        "last block": computing
        | block
        | {"gradients": state.gradients_before + head_gradient, "activations": all_saved}
        | {"exchange": block["exchange"] + model.layers * gathered},
        "first block": computing
        | block
        | {"gradients": state.gradients_after, "activations": min(all_saved, first_saved)}
        | {"exchange": block["exchange"] + gathered},
        "update": always | {"gradients": state.gradients_at_update},
    }


def _always(layout: RunLayout) -> dict[str, int]:
    """Return what exists during the whole step: token ids and labels, tables of positions, the record of a stream."""
    model, tokens = layout.config.model, layout.local_tokens
    encoding = POSITION_ENCODINGS[model.positions]
    grids = len({(pattern.segment_lengths, pattern.shift) for pattern in model.pattern_counts})
    tables = encoding.num_tables() * (grids if encoding.scales else 1)
    positions = tokens // layout.micro_batch_size * tables * model.head_dim * WIDE
    row = 2 * 8  # a token and its label
    if isinstance(model, EncoderConfig):
        row = (WIDE + layout.itemsize) * (model.feature_dim or model.dim) + 8 * model.coordinates
    return {"inputs": row * tokens + positions, "stream": _stream(layout)}


def _stream(layout: RunLayout) -> int:
    """Return the bytes of the records of all chunks but the last, in every layer, and of the open ones' gradients."""
    if layout.num_chunks == 1:
        return 0
    model, sizes = layout.config.model, (layout.config.data.sequence_length, layout.chunk_length, layout.mesh.sequence)
    layers = model.pattern_counts.items()
    recorded, opened = (sum(n * rows(pattern, *sizes) for pattern, n in layers) for rows in (record_rows, cache_rows))
    return _record_numbers(layout) * (recorded * layout.itemsize + opened * WIDE)


def _gathered(layout: RunLayout, exchange: Exchange) -> int:
    """Return the bytes of the gathered keys and values that a layer saves; a stream has them in its record."""
    return 0 if layout.num_chunks > 1 else exchange.buffered_rows * _record_numbers(layout) * layout.itemsize


def _in_flight(layout: RunLayout, exchange: Exchange) -> int:
    """Return the bytes of the float32 gradients of gathered keys and values, and of the messages with them."""
    model = layout.config.model
    messages = 2 * exchange.received * 2 * model.head_dim * layout.micro_batch_size
    return WIDE * (messages + exchange.buffered_rows * _record_numbers(layout))


def _record_numbers(layout: RunLayout) -> int:
    """Return the numbers in the keys and values of one row, over all heads and sequences."""
    return 2 * layout.config.model.key_dim * layout.micro_batch_size


def _logits(layout: RunLayout) -> int:
    """Return the bytes of the final norm's input, output and gradient, and of a chunk of logits (model/loss.py)."""
    model, tokens, itemsize = layout.config.model, layout.local_tokens, layout.itemsize
    chunk = min(model.logits_rows, tokens) * model.num_outputs * (2 * WIDE + itemsize)
    weight_sums = model.num_outputs * model.dim * (WIDE + itemsize)
    norm = WIDE + itemsize if isinstance(model, HuggingFaceConfig) else 0  # it keeps its input in float32, and normed
    return chunk + weight_sums + tokens * model.dim * (3 * itemsize + norm)


def _host(layout: RunLayout) -> dict[str, int]:
    """Return the host memory of the rank that needs most, without the tensors of a CPU rank."""
    train, copied = layout.config.train, 0
    if train.checkpoint_async and train.checkpoint_every:
        copied = -(-_checkpoint_bytes(layout) // (layout.num_ranks if _in_parts(layout) else 1))
    checkpoint = {CHECKPOINT: copied}
    if layout.device_type == "cpu":
        return checkpoint
    return {
        "process": HOST_PROCESS_BYTES,
        "optimizer": state_of(layout).host,
        "activations": offloaded_bytes(layout),
        **checkpoint,
    }


def _checkpoint_bytes(layout: RunLayout) -> int:
    """Return the bytes of a checkpoint: weights and optimizer states, float32."""
    model = layout.config.model
    return WIDE * (num_parameters(model) + optimizer_numbers(model, layout.config.train.optimizer))


def _in_parts(layout: RunLayout) -> bool:
    """Say whether each rank writes its part of a checkpoint."""
    return layout.config.train.writes_parts(_checkpoint_bytes(layout), layout.num_ranks)


def offloaded_bytes(layout: RunLayout) -> int:
    """Return the bytes that all blocks but the resident ones copy to the host, for one pass."""
    train = layout.config.train
    others = max(layout.config.model.layers - train.resident, 0)
    if not train.offload_activations:
        return 0
    return others * saved_by_block(layout) + min(train.offload_qkv, others) * saved_qkv(layout)
