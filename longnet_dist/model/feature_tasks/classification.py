"""Tell the class of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from longnet_dist.attention.stream import Stream
from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.errors import ConfigError
from longnet_dist.model.encoder import LongNetEncoder
from longnet_dist.model.feature_tasks import FEATURE_TASKS, FeatureTask, PackedSequences, TaskHead, TaskOutput
from longnet_dist.model.loss import IGNORE_INDEX
from longnet_dist.numerics import wide_dtype


@FEATURE_TASKS.register("classification")
class Classification(FeatureTask):
    """Map the pool of each sequence to logits of the classes; the loss is the cross-entropy of its label."""

    source: ClassVar[str] = "a linear layer on the pool, as GigaPath and vision transformers are fine-tuned"
    has_classes: ClassVar[bool] = True

    def __init__(self, encoder: LongNetEncoder, num_classes: int, mask_share: float) -> None:
        super().__init__(encoder, num_classes, mask_share)
        self.head = TaskHead(encoder.config.dim, num_classes)

    @classmethod
    def check(cls, config: EncoderConfig) -> None:
        """Refuse an encoder without a pool.

        Raises:
            ConfigError: with the remedy.
        """
        if config.pool == "none":
            raise ConfigError(
                "data.task=classification needs one vector of each sequence, but model.pool=none; use model.pool=mean, "
                "or model.pool=cls with model.cls_token=true"
            )

    def wanted(self, packed: PackedSequences, window: tuple[int, int]) -> Tensor:
        """Return the label of each sequence that begins in a slice, ``(sequences,)`` int64; -100 for others."""
        return packed.own_labels(window)

    def num_targets(self, wanted: Tensor) -> int:
        """Count the sequences that begin in the slice."""
        return int((wanted != IGNORE_INDEX).sum())

    def forward(self, features: Tensor, coords: Tensor, wanted: Tensor, *, stream: Stream) -> TaskOutput:
        """Return the cross-entropy of the sequences that begin in this slice; see :class:`FeatureTask`.

        The pool is summed over the ranks, and so is its gradient. Hence each sequence counts on one rank alone.
        """
        logits = self.head(self.encode(features.to(self.head.weight.dtype), coords, stream).pooled)
        logits = logits.to(wide_dtype(logits.dtype))
        loss = F.cross_entropy(logits, wanted, ignore_index=IGNORE_INDEX, reduction="sum")
        return TaskOutput(loss, (wanted != IGNORE_INDEX).sum(), logits.detach())

    def metrics(self, logits: Tensor, labels: Sequence[int]) -> dict[str, float]:
        """Return the accuracy, and the area under the ROC curve: of the second class of two, else the mean of all.

        A class that has no sequence, or all, has no area; without any area it is left out.
        """
        truth = torch.tensor(labels)
        scores = logits.softmax(-1).numpy()
        classes = [1] if scores.shape[1] == 2 else range(scores.shape[1])
        areas = [area_under_curve(scores[:, number], (truth == number).numpy()) for number in classes]
        known = [area for area in areas if area is not None]
        found = {"accuracy": float((logits.argmax(-1) == truth).double().mean())}
        return found | ({"auc": sum(known) / len(known)} if known else {})


def area_under_curve(scores: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_]) -> float | None:
    """Return the probability that a positive has a higher score than a negative; ties count half.

    That is the area under the ROC curve (Hanley and McNeil 1982). None without positives or without negatives.

    Args:
        scores: ``(n,)``.
        positive: ``(n,)``.
    """
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return None
    _, number, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[number]  # of equal scores the mean rank, from 1
    above = ranks[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))
