"""A token file is read in windows; each rank reads only its slice of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longnet_dist.config.model import LongNetConfig
from longnet_dist.data.shuffle import hashed, permuted
from longnet_dist.data.token_file import SplitName, TokenFile
from longnet_dist.errors import ConfigError, DataError

Objective = Literal["causal", "masked"]

IGNORE_INDEX = -100  # the label of a position without a target; torch's cross-entropy ignores it
MASKED_SHARE = 0.15  # as in BERT
_MASKED_BELOW = np.uint64(int(MASKED_SHARE * 2**64))

_Ids = npt.NDArray[np.int64]


class Windows:
    """A split is cut into windows of ``N`` tokens: window ``i`` has its positions ``[i·N, (i+1)·N)``.

    The last window may be shorter.

    * Objective ``"causal"``: the label of position ``j`` is token ``j + 1``. Two consecutive windows share one token,
      the last label of the first and the first input of the second. So every token but the first of the split is a
      label exactly once.
    * Objective ``"masked"``: a hash of (seed, sample, position) picks 15 % of the positions. Their input is ``mask_id``
      and their label is their token. The label of all other positions is −100.

    Args:
        token_file: the open token file.
        split: ``"train"``, ``"validation"`` or ``"all"``, which is the whole file.
        sequence_length: tokens ``N`` of a window.
        vocab_size: vocabulary size of the model; a file with larger ids is refused. None: do not check.
        objective: ``"causal"`` or ``"masked"``.
        mask_id: id that replaces a masked token; required by ``"masked"``.
        seed: seed of the masks.

    Raises:
        DataError: an id in the file is outside of the vocabulary, or the split has no labelled position.
        ConfigError: the length is less than 1, the objective is unknown, or the mask id is missing.
    """

    def __init__(
        self,
        token_file: TokenFile,
        split: SplitName,
        sequence_length: int,
        *,
        vocab_size: int | None = None,
        objective: Objective = "causal",
        mask_id: int | None = None,
        seed: int = 0,
    ) -> None:
        if sequence_length < 1:
            raise ConfigError(f"data.sequence_length must be at least 1, not {sequence_length}")
        if objective not in ("causal", "masked"):
            raise ConfigError(f"the objective must be causal or masked, not {objective!r}")
        if objective == "masked" and mask_id is None:
            raise ConfigError("the objective masked needs a mask_id; give the one of the model")
        _refuse_foreign_ids(token_file, vocab_size)
        self.token_file = token_file
        self.split = split
        self.sequence_length = sequence_length
        self.seed = seed
        self._vocab_size = vocab_size
        self._mask_id = mask_id if objective == "masked" else None
        self._first, last = token_file.split(split)
        self.num_positions = last - self._first - 1  # the last token of a split is a label only
        if self.num_positions < 1:
            raise DataError(
                f"the {split} split of {token_file.path} has {last - self._first} tokens and needs at least 2; "
                "prepare it from more text or with another --validation share"
            )

    def __len__(self) -> int:
        """Return the number of windows, with the last one, which may be short."""
        return -(-self.num_positions // self.sequence_length)

    @property
    def num_full(self) -> int:
        """Return the number of windows that have all ``sequence_length`` tokens."""
        return self.num_positions // self.sequence_length

    def length_of(self, index: int) -> int:
        """Return the tokens of window ``index``: ``sequence_length``, or fewer in the last one."""
        return min(self.sequence_length, self.num_positions - index * self.sequence_length)

    def batches(self, batch_size: int) -> Iterator[range]:
        """Yield all windows in order, as ranges of up to ``batch_size`` indices with equally long windows."""
        for first in range(0, self.num_full, batch_size):
            yield range(first, min(first + batch_size, self.num_full))
        if self.num_full < len(self):
            yield range(self.num_full, len(self))

    def local(
        self, indices: Sequence[int], window: tuple[int, int] | None = None, samples: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read positions ``[start, stop)`` of some windows, with their labels.

        Only these tokens and the one after them are read from the file.

        Args:
            indices: indices of ``B`` windows.
            window: ``(start, stop)`` of this rank's slice, None for all; if ``start == stop`` the result is empty.
            samples: for each window, the number that seeds its mask; by default its index.

        Returns:
            tokens and labels, each (B, n) int64 with n = stop − start.

        Raises:
            DataError: the slice is not inside every window, or the tokens in the file are damaged.
        """
        start, stop = window if window is not None else (0, self.length_of(indices[0]))
        if not all(0 <= start <= stop <= self.length_of(index) for index in indices):
            raise DataError(
                f"a rank's rows [{start}, {stop}) must lie in its windows, which have "
                f"{sorted({self.length_of(index) for index in indices})} rows"
            )
        rows = [
            self._read(index, sample, start, stop)
            for index, sample in zip(indices, samples if samples is not None else indices, strict=True)
        ]
        tokens, labels = (np.stack(parts) for parts in zip(*rows, strict=True))
        return torch.from_numpy(tokens), torch.from_numpy(labels)

    def num_labels(self, samples: Sequence[int], window: tuple[int, int]) -> int:
        """Count the labels at positions ``[start, stop)`` of some windows, without reading the file.

        Args:
            samples: for each window, the number that seeds its mask, as in :meth:`local`.
            window: ``(start, stop)``.
        """
        if self._mask_id is None:
            return len(samples) * (window[1] - window[0])
        return sum(int(self._is_masked(sample, *window).sum()) for sample in samples)

    def _is_masked(self, sample: int, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Say which of the positions ``[start, stop)`` of a sample are masked, ``(stop - start,)``."""
        masked: npt.NDArray[np.bool_] = hashed(self.seed, sample, np.arange(start, stop)) < _MASKED_BELOW
        return masked

    def _read(self, index: int, sample: int, start: int, stop: int) -> tuple[_Ids, _Ids]:
        origin = self._first + index * self.sequence_length
        read = self.token_file.tokens[origin + start : origin + stop + 1].astype(np.int64)
        if self._vocab_size is not None and read.max(initial=0) >= self._vocab_size:
            raise DataError(
                f"the tokens of {self.token_file.path} are damaged: its header promises ids up to "
                f"{self.token_file.header.max_id}, and there is a {read.max()}; copy it again or prepare it again"
            )
        if self._mask_id is None:
            return read[:-1], read[1:]
        masked, targets = self._is_masked(sample, start, stop), read[:-1]
        return np.where(masked, self._mask_id, targets), np.where(masked, targets, IGNORE_INDEX)


class Batches:
    """Batches are shuffled training samples; sample ``k`` is a pure function of (seed, k).

    So a run resumes from its step alone, without a saved state of the data. The samples are the full windows of a split
    (see :class:`Windows`). Each epoch visits all of them in another order. Step ``s`` takes the samples
    ``[s·batch_size, (s+1)·batch_size)``, whatever the number of ranks.

    Args:
        token_file, split, sequence_length, seed, vocab_size, objective, mask_id: as for :class:`Windows`.
        batch_size: sequences of a step, over all ranks.

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
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"train.batch_size must be at least 1, not {batch_size}")
        self.windows = Windows(
            token_file, split, sequence_length, vocab_size=vocab_size, objective=objective, mask_id=mask_id, seed=seed
        )
        self.batch_size = batch_size
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

    def windows_of(self, samples: Sequence[int]) -> list[int]:
        """Return, for each sample, the index of the window that it reads."""
        epochs, indices = np.divmod(np.asarray(samples, dtype=np.int64), self.num_samples)
        return list(map(int, permuted(indices, self.num_samples, self.seed, epochs)))

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
            window: ``(start, stop)`` of this sequence rank's slice; None for the whole sequence.
            micro_batch: index of the micro-batch, in ``[0, num_micro_batches)``.
            num_micro_batches: micro-batches of a step.

        Returns:
            tokens and labels, each (b, n) int64; a label is the target of its position, or −100.

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
        """Count the labels that :meth:`local` returns for the same arguments, without reading the file."""
        return self.windows.num_labels(
            self._samples(step, data_rank, data_size, micro_batch, num_micro_batches), window
        )

    def _samples(self, step: int, data_rank: int, data_size: int, micro_batch: int, num_micro_batches: int) -> range:
        parts = data_size * num_micro_batches
        if self.batch_size % parts:
            raise ConfigError(
                f"train.batch_size must be a multiple of the {data_size} data ranks times {num_micro_batches} "
                f"micro-batches, but {self.batch_size} is not; use {-(-self.batch_size // parts) * parts}"
            )
        size = self.batch_size // parts
        first = step * self.batch_size + (data_rank * num_micro_batches + micro_batch) * size
        return range(first, first + size)


def _refuse_foreign_ids(token_file: TokenFile, vocab_size: int | None) -> None:
    """Compare the vocabulary with the largest id in the header, so that no step has to search its tokens."""
    if vocab_size is not None and token_file.header.max_id >= vocab_size:
        raise DataError(
            f"{token_file.path} holds the token id {token_file.header.max_id}, but the model's vocabulary ends at "
            f"{vocab_size - 1}; set model.vocab_size={token_file.tokenizer.vocab_size} or prepare the text with a "
            "smaller tokenizer"
        )


def objective(model: LongNetConfig) -> dict[str, Any]:
    """Return the arguments of ``Windows`` and ``Batches`` that follow from the model: objective and ids."""
    kind: Objective = "causal" if model.causal else "masked"
    return {"objective": kind, "mask_id": model.mask_id, "vocab_size": model.vocab_size}
