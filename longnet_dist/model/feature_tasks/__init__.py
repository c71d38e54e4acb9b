"""What encoders learn from features (``data.task``), each in a file of its own.

A task registers a class under its name::

    @FEATURE_TASKS.register("centre")
    class Centre(FeatureTask):
        ...

It is an encoder with a head, and its loss. Sequences are packed: they lie one behind the other in one item, of which
each rank has an even slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from longnet_dist.attention.stream import Stream
from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.model.block import Block
from longnet_dist.model.encoder import LongNetEncoder
from longnet_dist.model.longnet import stream_of
from longnet_dist.registry import FEATURE_TASKS

__all__ = ["FEATURE_TASKS", "FeatureTask", "PackedSequences", "TaskHead", "TaskOutput"]


class PackedSequences(Protocol):
    """Name what a task may ask of packed sequences, which ``data/features/feature_batches.py`` has."""

    def hidden(self, window: tuple[int, int], share: float) -> Tensor:
        """Return which rows of a slice are hidden, ``(1, n)`` bool, without cls rows."""

    def own_labels(self, window: tuple[int, int]) -> Tensor:
        """Return the label of each sequence that begins in a slice, ``(sequences,)`` int64; -100 for others."""


class TaskOutput(NamedTuple):
    """Hold what a task returns for this rank's slice.

    Attributes:
        loss_sum: sum of the losses of this rank's targets, float32 (float64 for float64 models).
        num_labels: number of these targets, int64 scalar.
        logits: ``(sequences, classes)``, the same on all ranks of a group; None for tasks without classes.
    """

    loss_sum: Tensor
    num_labels: Tensor
    logits: Tensor | None = None


class TaskHead(nn.Linear):
    """Map the encoder's states to what a task predicts; its bias begins at 0."""

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class FeatureTask(nn.Module):
    """Compute the loss of an encoder with a head.

    Args:
        encoder: takes features.
        num_classes: classes of the labels; 0 without labels.
        mask_share: share of the rows that are hidden, of tasks that hide some.

    Attributes:
        source: where the task was described.
        has_classes: whether the task needs labels.
    """

    source: ClassVar[str]
    has_classes: ClassVar[bool] = False

    def __init__(self, encoder: LongNetEncoder, num_classes: int, mask_share: float) -> None:
        super().__init__()
        self.encoder, self.num_classes, self.mask_share = encoder, num_classes, mask_share

    @classmethod
    def check(cls, config: EncoderConfig) -> None:
        """Refuse an encoder that cannot learn the task.

        Raises:
            ConfigError: with the remedy.
        """

    def wanted(self, packed: PackedSequences, window: tuple[int, int]) -> Tensor:
        """Return the targets of a slice, or what they follow from, which :meth:`forward` takes."""
        raise NotImplementedError

    def num_targets(self, wanted: Tensor) -> int:
        """Count the targets in what :meth:`wanted` returned."""
        raise NotImplementedError

    def forward(self, features: Tensor, coords: Tensor, wanted: Tensor, *, stream: Stream) -> TaskOutput:
        """Return the loss of this rank's slice; all ranks of the group must call.

        Args:
            features: ``(1, n, F)``, the rows of the slice that are no cls rows.
            coords: ``(1, n, C)``; they are left out if ``C`` is 0 or the encoder takes none.
            wanted: of :meth:`wanted`.
            stream: of :meth:`stream`, which has the lengths of all sequences.
        """
        raise NotImplementedError

    def stream(self, total_rows: int, cu_seqlens: Any = None) -> Stream:
        """Return the geometry of packed sequences, cls rows counted; they pass as one chunk."""
        return stream_of(self.encoder.config, self.encoder.group, total_rows, cu_seqlens)

    @property
    def block_types(self) -> list[type[nn.Module]]:
        """Return the classes of the blocks."""
        return [Block]

    def metrics(self, logits: Tensor, labels: Sequence[int]) -> dict[str, float]:
        """Return what else a validation reports, by name.

        Args:
            logits: ``(sequences, classes)`` float64, of all sequences; without classes ``(sequences, 0)``.
            labels: number of the class of each sequence.
        """
        return {}

    def encode(self, features: Tensor, coords: Tensor, stream: Stream) -> Any:
        """Return the encoder's output for features in its own precision."""
        takes = self.encoder.config.position_embedding == "sincos" and coords.shape[-1] > 0
        return self.encoder(features=features, coords=coords if takes else None, packed=stream.documents)
