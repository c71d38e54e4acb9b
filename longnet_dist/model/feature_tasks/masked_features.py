"""Predict hidden rows from the others."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longnet_dist.attention.stream import Stream
from longnet_dist.model.encoder import LongNetEncoder
from longnet_dist.model.feature_tasks import FEATURE_TASKS, FeatureTask, PackedSequences, TaskHead, TaskOutput
from longnet_dist.numerics import wide_dtype


@FEATURE_TASKS.register("masked_features")
class MaskedFeatures(FeatureTask):
    """Hide the features of some rows, and predict them from the other rows and all places.

    A learned vector takes the place of hidden features, and a linear layer predicts them. The loss of a row is the
    squared error, averaged over its channels.
    """

    source: ClassVar[str] = "SimMIM, arXiv 2111.09886; masked autoencoders, arXiv 2111.06377"

    def __init__(self, encoder: LongNetEncoder, num_classes: int, mask_share: float) -> None:
        super().__init__(encoder, num_classes, mask_share)
        channels = encoder.config.feature_dim or encoder.config.dim
        self.mask = nn.Parameter(torch.randn(channels) * 0.02)
        self.head = TaskHead(encoder.config.dim, channels)

    def wanted(self, packed: PackedSequences, window: tuple[int, int]) -> Tensor:
        """Return which rows of a slice are hidden, ``(1, n)`` bool, without cls rows."""
        return packed.hidden(window, self.mask_share)

    def num_targets(self, wanted: Tensor) -> int:
        """Count the hidden rows."""
        return int(wanted.sum())

    def forward(self, features: Tensor, coords: Tensor, wanted: Tensor, *, stream: Stream) -> TaskOutput:
        """Return the squared errors of the hidden rows of this slice; see :class:`FeatureTask`."""
        dtype = self.mask.dtype
        shown = torch.where(wanted.unsqueeze(-1), self.mask, features.to(dtype))
        states = self.encode(shown, coords, stream).last_hidden_state
        # Cls rows have no features. They lie before the first row of each sequence that begins in this slice.
        own = torch.ones(states.shape[1], dtype=torch.bool, device=states.device)
        if self.encoder.config.cls_token:
            assert stream.documents is not None
            assert stream.shards is not None
            start, stop = stream.shards.window(stream.rank)
            own[[first - start for first in stream.documents.starts if start <= first < stop]] = False
        wide = wide_dtype(dtype)
        hidden = wanted[0]
        predicted = self.head(states[0, own][hidden])
        error = F.mse_loss(predicted.to(wide), features[0, hidden].to(wide), reduction="sum") / features.shape[-1]
        return TaskOutput(error, hidden.sum())
