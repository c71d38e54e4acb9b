"""Peak memory of a rank by part, at each moment of a step that can be the worst."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from longnet_dist.estimate.activations import (
    WIDE,
    attention_backward_bytes,
    held_by_block,
    kept_by_block,
    projections_kept,
)
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.model_cost import num_parameters
from longnet_dist.estimate.state import state_of
from longnet_dist.estimate.traffic import Exchange, exchange_of
from longnet_dist.geometry.chunks import cache_rows, record_rows

HOST_PROCESS_BYTES = 4 * 2**30  # of a process that has CUDA and all libraries loaded
MASTER_COPY_BYTES = 12  # of a parameter, in the copy that an asynchronous checkpoint is written from
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank.

    Attributes:
        moment: when the device holds most: ``loss``, ``last block`` or ``first block`` (of backward), ``update``.
        device: by part, at that moment; what torch's allocator counts.
        host: by part, beside the device's; ``CHECKPOINT`` of rank 0 alone.
    """

    moment: str
    device: Mapping[str, int]
    host: Mapping[str, int]

    @property
    def device_bytes(self) -> int:
        """All parts together."""
        return sum(self.device.values())

    def host_parts(self, local_ranks: int) -> dict[str, int]:
        """The host's parts of all ranks of a machine."""
        return {name: size * (1 if name == CHECKPOINT else local_ranks) for name, size in self.host.items()}


def memory_of(layout: RunLayout) -> Memory:
    """The peak memory of the rank that needs most."""
    moments = _moments(layout)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Memory(moment, moments[moment], _host(layout))


def _moments(layout: RunLayout) -> dict[str, dict[str, int]]:
    """The parts at each moment."""
    model, state, rows = layout.config.model, state_of(layout), layout.local_rows
    exchange = exchange_of(layout)
    always = {"parameters": state.parameters, "optimizer": state.optimizer} | _always(layout)
    computing = always | {"parameters": state.parameters + state.gathered}
    kept, held = kept_by_block(layout), held_by_block(layout)
    train = layout.config.train
    blocks = max(train.resident, train.least_resident) if train.offload_activations else model.layers
    with_projections = min(train.cache_qkv, model.layers)
    here = max(with_projections - train.offload_qkv, min(with_projections, blocks))
    all_kept = min(model.layers, blocks) * kept + here * projections_kept(layout)
    first_kept = kept + (with_projections == model.layers) * projections_kept(layout)
    attention = min(held, rows * attention_backward_bytes(layout))
    block = {"block": held - attention, "attention": attention, "exchange": _in_flight(layout, exchange)}
    gathered = _gathered(layout, exchange)
    head_gradient = model.vocab_size * model.dim * layout.itemsize
    return {
        "loss": computing
        | {"gradients": state.gradients_before, "activations": all_kept, "logits": _logits(layout)}
        | {"exchange": model.layers * gathered},
        "last block": computing
        | block
        | {"gradients": state.gradients_before + head_gradient, "activations": all_kept}
        | {"exchange": block["exchange"] + model.layers * gathered},
        "first block": computing
        | block
        | {"gradients": state.gradients_after, "activations": min(all_kept, first_kept)}
        | {"exchange": block["exchange"] + gathered},
        "update": always | {"gradients": state.gradients_at_update},
    }


def _always(layout: RunLayout) -> dict[str, int]:
    """What a step holds from its beginning to its end: ids and labels, tables of positions, the record of a stream."""
    model, rows = layout.config.model, layout.local_rows
    tables = {"none": 0, "rope": 2, "xpos": 4}[model.positions]
    positions = rows // layout.micro_batch_size * tables * model.head_dim // 2 * WIDE
    return {"inputs": 2 * 8 * rows + positions, "stream": _stream(layout)}


def _stream(layout: RunLayout) -> int:
    """Records of all chunks but the last in every layer, and the gradients of those that are open."""
    if layout.num_chunks == 1:
        return 0
    model, sizes = layout.config.model, (layout.config.data.sequence_length, layout.chunk_length, layout.mesh.sequence)
    recorded, opened = record_rows(model.pattern, *sizes), cache_rows(model.pattern, *sizes)
    return _record_bytes(layout) * model.layers * (recorded * layout.itemsize + opened * WIDE)


def _gathered(layout: RunLayout, exchange: Exchange) -> int:
    """Keys and values of other ranks that a layer keeps for backward; in a stream they are in its record."""
    return 0 if layout.num_chunks > 1 else exchange.held_rows * _record_bytes(layout) * layout.itemsize


def _in_flight(layout: RunLayout, exchange: Exchange) -> int:
    """Gradients of gathered rows, and the messages they travel in, in float32."""
    model = layout.config.model
    messages = 2 * exchange.received * 2 * model.head_dim * layout.micro_batch_size
    return WIDE * (messages + exchange.held_rows * _record_bytes(layout))


def _record_bytes(layout: RunLayout) -> int:
    """Numbers in the keys and values of a row of all heads and sequences."""
    model = layout.config.model
    return 2 * model.head_dim * (model.kv_heads or model.heads) * layout.micro_batch_size


def _logits(layout: RunLayout) -> int:
    """The final norm's input and output, their gradient, and a chunk of logits (model/loss.py)."""
    model, rows, itemsize = layout.config.model, layout.local_rows, layout.itemsize
    chunk = min(model.logits_rows, rows) * model.vocab_size * (2 * WIDE + itemsize)
    weight_sums = model.vocab_size * model.dim * (WIDE + itemsize)
    return chunk + weight_sums + 3 * rows * model.dim * itemsize


def _host(layout: RunLayout) -> dict[str, int]:
    """Memory of the host beside the device's, of rank 0, which alone writes checkpoints."""
    train, model = layout.config.train, layout.config.model
    copied = train.checkpoint_async and train.checkpoint_every
    checkpoint = MASTER_COPY_BYTES * num_parameters(model) if copied else 0
    if layout.device_type == "cpu":
        return {CHECKPOINT: checkpoint}
    return {
        "process": HOST_PROCESS_BYTES,
        "optimizer": state_of(layout).host,
        "activations": offloaded_bytes(layout),
        CHECKPOINT: checkpoint,
    }


def offloaded_bytes(layout: RunLayout) -> int:
    """What all blocks but the resident ones move to the host."""
    train = layout.config.train
    others = max(layout.config.model.layers - train.resident, 0)
    if not train.offload_activations:
        return 0
    return others * kept_by_block(layout) + min(train.offload_qkv, others) * projections_kept(layout)
