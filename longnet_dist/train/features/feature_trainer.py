"""A run on features: its model, its micro-batches and its validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from longnet_dist.comm.agreement import refuse_together
from longnet_dist.data.features.feature_batches import FeatureBatches
from longnet_dist.data.features.feature_set import FeatureSet
from longnet_dist.data.shuffle import hashed
from longnet_dist.errors import DataError
from longnet_dist.inference.features.feature_evaluation import evaluate_features
from longnet_dist.model.feature_tasks import FEATURE_TASKS, FeatureTask
from longnet_dist.train.batch_prefetch import pinned
from longnet_dist.train.loop import Trainer
from longnet_dist.train.step import MicroBatch


@dataclass(frozen=True)
class FeatureMicroBatch(MicroBatch):
    """A FeatureMicroBatch has the rows of this rank, or the fault for which they could not be read.

    Attributes:
        fault: message, to be told to all ranks before they compute.
    """

    fault: str | None = None


class FeatureTrainer(Trainer):
    """Train an encoder with the head of a task, on sequences that lie one behind the other in a micro-batch."""

    token_file: FeatureSet
    batches: FeatureBatches
    validation: FeatureBatches | None

    def _describe(self, described: dict[str, Any]) -> None:
        self.plan.folder.describe(described, None, self.token_file.classes)
        print(self.token_file.report())

    def _model(self) -> nn.Module:
        data = self.config.data
        encoder = super()._model()
        task: FeatureTask = FEATURE_TASKS[data.feature_task](encoder, len(self.token_file.classes), data.mask_share)
        return task

    def _tokens_of(self, step: int) -> int:
        return self.batches.rows_of(step)

    def _micro_batch(self, step: int, number: int) -> MicroBatch:
        """Read this rank's rows of a micro-batch, in a thread beside the step before it."""
        mesh = self.mesh
        packed = self.batches.packed(step, mesh.data_rank, mesh.shape.data, number, self.plan.accumulation)
        task: FeatureTask = self.engine.module
        stream = task.stream(packed.rows)
        window = stream.chunks(packed.rows)[0].window(stream.rank)
        wanted = task.wanted(packed, window)
        fault = None
        try:
            features, coords = packed.read(window)
        except DataError as error:
            fault, features, coords = str(error), torch.empty(0), torch.empty(0)
        rows = pinned((features, coords, wanted), self.device)
        place = mesh.data_rank, number, mesh.sequence_rank
        seed = int(hashed(self.config.train.seed, step, *place)[0] >> 1)
        targets = task.num_targets(wanted)
        return FeatureMicroBatch(lambda _: rows, lambda _: targets, packed.documents, packed.rows, seed, fault)

    def _check_read(self, micro_batches: list[MicroBatch]) -> None:
        faults = (part.fault for part in micro_batches if isinstance(part, FeatureMicroBatch))
        refuse_together([fault for fault in faults if fault is not None], self.device)

    def _evaluate(self, data: Any) -> Mapping[str, float]:
        return evaluate_features(self.engine, data, self.plan.micro_batch_size, self.mesh, self.device)
