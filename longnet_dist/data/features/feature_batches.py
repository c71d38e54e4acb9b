"""Sequences of unequal lengths lie one behind the other in a micro-batch, of which each rank reads its slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from longnet_dist.data.features.feature_files import FeatureFile
from longnet_dist.data.features.feature_set import FeatureSet
from longnet_dist.data.shuffle import hashed, in_epochs, samples_of
from longnet_dist.data.windows import IGNORE_INDEX
from longnet_dist.geometry.documents import Documents

Window = tuple[int, int]


@dataclass(frozen=True)
class PackedFeatures:
    """PackedFeatures are sequences that a data rank computes at once, without padding.

    Attributes:
        files: of the sequences, in their order.
        labels: number of the class of each; empty without classes.
        samples: numbers from which the hidden rows of each follow.
        seed: of the hidden rows.
        cls_rows: rows before each sequence that no file has: 1 with a cls row, else 0.
    """

    files: tuple[FeatureFile, ...]
    labels: tuple[int, ...]
    samples: tuple[int, ...]
    seed: int
    cls_rows: int

    @cached_property
    def documents(self) -> Documents:
        """Return the sequences as documents, cls rows included."""
        lengths = [file.rows + self.cls_rows for file in self.files]
        return Documents.of_edges([0, *np.cumsum(lengths).tolist()])

    @property
    def rows(self) -> int:
        """Return the rows of all sequences, cls rows included."""
        return self.documents.stops[-1]

    def read(self, window: Window) -> tuple[Tensor, Tensor]:
        """Read the rows in a window of all rows: features ``(1, n, F)`` and coordinates ``(1, n, C)``.

        A cls row in the window is left out.

        Raises:
            DataError: a file cannot be read, has changed, or has numbers that are not finite.
        """
        parts = [self.files[number].read(start, stop) for number, start, stop in self._pieces(window)]
        if not parts:  # a slice of one cls row
            file = self.files[0]
            return torch.empty(1, 0, file.channels), torch.empty(1, 0, file.coordinates)
        features, coords = (torch.cat(kind)[None] for kind in zip(*parts, strict=True))
        return features, coords

    def hidden(self, window: Window, share: float) -> Tensor:
        """Return which of the rows that :meth:`read` returns are hidden, ``(1, n)`` bool; seed and sample decide."""
        below = np.uint64(int(share * 2**64))
        parts = [
            hashed(self.seed, self.samples[number], np.arange(start, stop)) < below
            for number, start, stop in self._pieces(window)
        ]
        return torch.from_numpy(np.concatenate([np.zeros(0, bool), *parts]))[None]

    def own_labels(self, window: Window) -> Tensor:
        """Return the label of each sequence whose first row is in the window, ``(sequences,)`` int64; -100 for others.

        So each sequence is labelled on one rank.
        """
        start, stop = window
        own = [start <= first < stop for first in self.documents.starts]
        pairs = zip(self.labels, own, strict=True)
        return torch.tensor([label if mine else IGNORE_INDEX for label, mine in pairs])

    def _pieces(self, window: Window) -> list[tuple[int, int, int]]:
        """Return number, first and last row (exclusive) of the parts of files in a window."""
        found = []
        for number, (first, last) in enumerate(zip(self.documents.starts, self.documents.stops, strict=True)):
            first += self.cls_rows
            start, stop = max(window[0], first), min(window[1], last)
            if start < stop:
                found.append((number, start - first, stop - first))
        return found


class FeatureBatches:
    """FeatureBatches are shuffled sequences; sample ``k`` is a pure function of (seed, k).

    Each epoch visits all files in another order. Step ``s`` takes the ``batch_size`` samples from ``s·batch_size +
    sample_offset`` on, whatever the number of ranks.

    Args:
        features: the data of the run.
        names: of the files, such as those of a split.
        batch_size: sequences of a step, over all ranks.
        seed: of the order and of hidden rows.
        cls_token: whether the model puts a row before each sequence.
        sample_offset: samples seen before a step, minus ``batch_size`` for each earlier step.
    """

    packing_report = ""

    def __init__(
        self,
        features: FeatureSet,
        names: Sequence[str],
        batch_size: int,
        seed: int,
        cls_token: bool,
        sample_offset: int = 0,
    ) -> None:
        self.features, self.names, self.batch_size, self.seed = features, list(names), batch_size, seed
        self.cls_token, self.sample_offset = cls_token, sample_offset

    def packed(
        self, step: int, data_rank: int = 0, data_size: int = 1, micro_batch: int = 0, num_micro_batches: int = 1
    ) -> PackedFeatures:
        """Return a micro-batch of a data rank.

        Args:
            step: index of the step, from 0.
            data_rank: coordinate of the rank along the data axis.
            data_size: ranks along the data axis.
            micro_batch: index of the micro-batch.
            num_micro_batches: micro-batches of a step.

        Raises:
            ConfigError: ``batch_size`` is not a multiple of ``data_size · num_micro_batches``.
        """
        place = data_rank, data_size, micro_batch, num_micro_batches
        samples = samples_of(step, self.batch_size, self.sample_offset, *place)
        order = in_epochs(samples, len(self.names), self.seed)
        return self.of_names([self.names[number] for number in order], samples)

    def in_order(self, batch_size: int) -> list[PackedFeatures]:
        """Return all files once, in alphabetical order, ``batch_size`` at a time."""
        firsts = range(0, len(self.names), batch_size)
        parts = ((first, self.names[first : first + batch_size]) for first in firsts)
        return [self.of_names(names, range(first, first + len(names))) for first, names in parts]

    def of_names(self, names: Sequence[str], samples: Sequence[int]) -> PackedFeatures:
        """Return the sequences of some files; ``samples`` are the numbers that their hidden rows follow from."""
        labels = self.features.labels
        return PackedFeatures(
            tuple(self.features.files[name] for name in names),
            tuple(labels[name] for name in names) if labels else (),
            tuple(samples),
            self.seed,
            int(self.cls_token),
        )

    def rows_of(self, step: int) -> int:
        """Return the rows of all files of a step."""
        return sum(file.rows for file in self.packed(step).files)
