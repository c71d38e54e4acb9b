"""Training samples come in batches, in an order that the seed decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from longnet_dist.config.model import LongNetConfig
from longnet_dist.data.best_fit import FittedWindows
from longnet_dist.data.shuffle import in_epochs, samples_of
from longnet_dist.data.token_file import SplitName, TokenFile
from longnet_dist.data.windows import IGNORE_INDEX, Objective, Windows
from longnet_dist.errors import ConfigError, DataError
from longnet_dist.geometry.documents import Documents

__all__ = ["IGNORE_INDEX", "Batches", "Objective", "Packing", "Windows", "objective"]

Packing = Literal["contiguous", "best_fit"]


class Batches:
    """Batches are shuffled training samples; sample ``k`` is a pure function of (seed, k).

    So a run resumes from its step alone, without a saved state of the data. The samples are the full windows of a split
    (see :class:`Windows`). Each epoch visits all of them in another order. Step ``s`` takes the ``batch_size`` samples
    from ``s·batch_size + sample_offset`` on, whatever the number of ranks.

    Args:
        token_file, split, sequence_length, seed, vocab_size, objective, mask_id, documents: as for :class:`Windows`.
        batch_size: sequences of a step, over all ranks.
        packing: ``"best_fit"`` fills samples with whole documents (:class:`~.best_fit.FittedWindows`).
        sample_offset: samples seen before a step, minus ``batch_size`` for each earlier step; not 0 if the run had
            another batch size before.

    Raises:
        DataError: the split is shorter than one window, or the file does not fit the model.
    """

    def __init__(
        self,
        token_file: TokenFile,
        split: SplitName,
        sequence_length: int,
        batch_size: int,
        seed: int,
        *,
        vocab_size: int | None = None,
        objective: Objective = "causal",
        mask_id: int | None = None,
        documents: bool = False,
        packing: Packing = "contiguous",
        sample_offset: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"train.batch_size must be at least 1, not {batch_size}")
        options: dict[str, Any] = {"vocab_size": vocab_size, "objective": objective, "mask_id": mask_id, "seed": seed}
        if packing == "best_fit":
            self.windows: Windows = FittedWindows(token_file, split, sequence_length, **options)
        else:
            self.windows = Windows(token_file, split, sequence_length, **options, documents=documents)
        self.batch_size = batch_size
        self.sample_offset = sample_offset
        self.seed = seed
        if self.num_samples < 1:
            raise DataError(
                f"the {split} split of {token_file.path} has {self.windows.num_positions + 1} tokens, a sample needs "
                f"sequence_length + 1 = {sequence_length + 1}; use at most data.sequence_length="
                f"{self.windows.num_positions} or more text"
            )

    @property
    def num_samples(self) -> int:
        """Return the number of samples in an epoch."""
        return self.windows.num_full

    @property
    def packing_report(self) -> str:
        """Return how well samples are filled with documents, for people; empty if they are contiguous."""
        if not isinstance(self.windows, FittedWindows):
            return ""
        return (
            f"packing: {self.num_samples:,} samples, {self.windows.cut_share:.2%} of the documents are cut, "
            f"{self.windows.padding_share:.2%} of the tokens are padding"
        )

    def windows_of(self, samples: Sequence[int]) -> list[int]:
        """Return, for each sample, the index of the window that it reads."""
        return in_epochs(samples, self.num_samples, self.seed)

    def local(
        self,
        step: int,
        data_rank: int = 0,
        data_size: int = 1,
        window: tuple[int, int] | None = None,
        micro_batch: int = 0,
        num_micro_batches: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Read what one rank needs for one micro-batch of a step.

        A data rank takes ``batch_size / data_size`` consecutive samples of the step and cuts them into
        ``num_micro_batches`` equal parts. Only its slice, and the token after it, is read from the file.

        Args:
            step: index of the step, from 0.
            data_rank: coordinate of the rank along the data axis, in ``[0, data_size)``.
            data_size: ranks along the data axis.
            window: ``(start, stop)`` of this sequence rank's slice; None for the whole sequence. With documents it
                counts the positions of all samples of the micro-batch, one behind the other.
            micro_batch: index of the micro-batch, in ``[0, num_micro_batches)``.
            num_micro_batches: micro-batches of a step.

        Returns:
            tokens and labels, each (b, n) int64, with documents (1, n); a label is the target of its position, or −100.

        Raises:
            ConfigError: ``batch_size`` is not a multiple of ``data_size · num_micro_batches``.
        """
        samples = self._samples(step, data_rank, data_size, micro_batch, num_micro_batches)
        return self.windows.local(self.windows_of(samples), window, samples)

    def num_labels(
        self,
        step: int,
        data_rank: int,
        data_size: int,
        window: tuple[int, int],
        micro_batch: int = 0,
        num_micro_batches: int = 1,
    ) -> int:
        """Count the labels that :meth:`local` returns for the same arguments, without reading a token."""
        samples = self._samples(step, data_rank, data_size, micro_batch, num_micro_batches)
        return self.windows.num_labels(self.windows_of(samples), window, samples)

    def documents(
        self, step: int, data_rank: int = 0, data_size: int = 1, micro_batch: int = 0, num_micro_batches: int = 1
    ) -> Documents | None:
        """Return the documents of a micro-batch, its samples one behind the other; None if they are not kept apart.

        The arguments are those of :meth:`local`.
        """
        samples = self._samples(step, data_rank, data_size, micro_batch, num_micro_batches)
        return self.windows.documents_of(self.windows_of(samples))

    def _samples(self, step: int, *place: int) -> range:
        return samples_of(step, self.batch_size, self.sample_offset, *place)


def objective(model: LongNetConfig) -> dict[str, Any]:
    """Return the arguments of ``Windows`` and ``Batches`` that follow from the model: objective and ids."""
    kind: Objective = "causal" if model.causal else "masked"
    return {"objective": kind, "mask_id": model.mask_id, "vocab_size": model.vocab_size}
