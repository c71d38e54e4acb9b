"""How well an encoder with a head does its task on sequences that it has not seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longnet_dist.comm.agreement import refuse_together
from longnet_dist.comm.mesh import Mesh
from longnet_dist.comm.reductions import total_over_ranks
from longnet_dist.data.features.feature_batches import FeatureBatches, PackedFeatures
from longnet_dist.errors import DataError
from longnet_dist.model.feature_tasks import FeatureTask, TaskOutput


@torch.no_grad()
def evaluate_features(
    model: Any, batches: FeatureBatches, batch_size: int, mesh: Mesh, device: torch.device
) -> dict[str, float]:
    """Return the mean loss over all sequences, their number, and what else the task reports.

    Every rank of the world must call, and all get the same.

    Args:
        model: a task, or a DeepSpeed engine of one, in evaluation mode.
        batches: the sequences.
        batch_size: sequences that a data rank holds at once.
        mesh: the ranks; data ranks take turns with the batches.
        device: of the model.

    Raises:
        DataError: a file cannot be read; on all ranks.
    """
    task: FeatureTask = getattr(model, "module", model)
    classes = task.num_classes
    parts = batches.in_order(batch_size)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    logits = torch.zeros(len(batches.names), classes, dtype=torch.float64, device=device)
    for first in range(0, len(parts), mesh.shape.data):
        # With ZeRO stage 3 a forward is a collective of all ranks: one without a batch repeats the last.
        number = first + mesh.data_rank
        packed = parts[min(number, len(parts) - 1)]
        faults, inputs = [], None
        try:
            inputs = _inputs(task, packed, device)
        except DataError as error:
            faults = [str(error)]
        refuse_together(faults, device)
        assert inputs is not None
        output: TaskOutput = model(*inputs[:3], stream=inputs[3])
        if number < len(parts):
            sums += torch.stack([output.loss_sum.double(), output.num_labels.double()])
            if output.logits is not None:
                # A sequence counts on the rank on which it begins, as its loss does.
                own = inputs[2] >= 0
                place = number * batch_size
                logits[place : place + len(own)] = output.logits * own.unsqueeze(-1)
    loss_sum, num_targets = total_over_ranks(sums).tolist()
    labels = [batches.features.labels[name] for name in batches.names] if classes else []
    found = task.metrics(total_over_ranks(logits).cpu(), labels)
    return {"loss": loss_sum / max(1.0, num_targets), "sequences": len(batches.names), **found}


def _inputs(task: FeatureTask, packed: PackedFeatures, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Return what the model is called with on this rank."""
    stream = task.stream(packed.rows, packed.documents)
    (shards,) = stream.chunks(packed.rows)
    window = stream.enter(shards).window(stream.rank)
    features, coords = packed.read(window)
    return features.to(device), coords.to(device), task.wanted(packed, window).to(device), stream
