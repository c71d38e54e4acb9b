"""A split of a token file is cut into windows; each rank reads only its slice of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longnet_dist.data.shuffle import hashed
from longnet_dist.data.token_file import SplitName, TokenFile
from longnet_dist.errors import ConfigError, DataError
from longnet_dist.geometry.documents import Documents

Objective = Literal["causal", "masked"]
Integers = npt.NDArray[np.int64]

IGNORE_INDEX = -100  # the label of a position without a target; torch's cross-entropy ignores it
MASKED_SHARE = 0.15  # as in BERT
_MASKED_BELOW = np.uint64(int(MASKED_SHARE * 2**64))


class Windows:
    """A split is cut into windows of ``N`` tokens: window ``i`` has its positions ``[i·N, (i+1)·N)``.

    The last window may be shorter.

    * Objective ``"causal"``: the label of position ``j`` is token ``j + 1``. Two consecutive windows share one token,
      the last label of the first and the first input of the second. So every token but the first of the split is a
      label exactly once.
    * Objective ``"masked"``: a hash of (seed, sample, position) picks 15 % of the positions. Their input is ``mask_id``
      and their label is their token. The label of all other positions is −100.

    With ``documents`` no causal label crosses an edge: the last token of a document, which is the separator, predicts
    nothing. A document that a window cuts is two documents, and its last token in the window keeps its label. Several
    windows are then one sequence, one window behind the other, because each has documents of its own.

    Args:
        token_file: the open token file.
        split: ``"train"``, ``"validation"`` or ``"all"``, which is the whole file.
        sequence_length: tokens ``N`` of a window.
        vocab_size: vocabulary size of the model; a file with larger ids is refused. None: do not check.
        objective: ``"causal"`` or ``"masked"``.
        mask_id: id that replaces a masked token; required by ``"masked"``.
        seed: seed of the masks.
        documents: whether the documents of the file are kept apart.

    In a file that names its answers, these alone are causal labels.

    Raises:
        DataError: an id in the file is outside of the vocabulary, the split has no labelled position, the file has no
            edges of documents, or it has answers and the objective none.
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
        documents: bool = False,
    ) -> None:
        if sequence_length < 1:
            raise ConfigError(f"data.sequence_length must be at least 1, not {sequence_length}")
        if objective not in ("causal", "masked"):
            raise ConfigError(f"the objective must be causal or masked, not {objective!r}")
        if objective == "masked" and mask_id is None:
            raise ConfigError("the objective masked needs a mask_id; give the one of the model")
        _refuse_foreign_ids(token_file, vocab_size)
        if documents:
            token_file.require_edges()
        if token_file.answers is not None and objective != "causal":
            raise DataError(
                f"{token_file.path} names answers, which a causal model predicts, but the objective is {objective}; "
                f"use model.causal=true or another file"
            )
        self.token_file = token_file
        self.answers_only = token_file.answers is not None
        self.split = split
        self.sequence_length = sequence_length
        self.seed = seed
        self.documents = documents
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
            indices: indices of ``B`` equally long windows.
            window: ``(start, stop)`` of this rank's slice, None for all; if ``start == stop`` the result is empty. With
                ``documents`` it counts the positions of all windows, one behind the other.
            samples: for each window, the number that seeds its mask; by default its index.

        Returns:
            tokens and labels, each (B, n) int64 with n = stop − start; with ``documents`` (1, n).

        Raises:
            DataError: the slice is not inside every window, or the tokens in the file are damaged.
        """
        rows = self.sequence_rows(indices)
        start, stop = window if window is not None else (0, rows)
        if not 0 <= start <= stop <= rows or (not self.documents and stop > min(map(self.length_of, indices))):
            raise DataError(
                f"a rank's rows [{start}, {stop}) must lie in its windows, which have "
                f"{sorted({self.length_of(index) for index in indices})} rows"
            )
        samples = samples if samples is not None else indices
        read = [self._read(*part) for part in self._parts(indices, samples, start, stop)]
        tokens, labels = (
            np.concatenate(parts)[None] if self.documents else np.stack(parts) for parts in zip(*read, strict=True)
        )
        return torch.from_numpy(tokens), torch.from_numpy(labels)

    def sequence_rows(self, indices: Sequence[int]) -> int:
        """Return the rows of the sequence that some equally long windows are: of all of them with ``documents``."""
        return self.length_of(indices[0]) * (len(indices) if self.documents else 1)

    def documents_of(self, indices: Sequence[int], rows: int | None = None) -> Documents | None:
        """Return the documents of some windows, one window behind the other; None without ``documents``.

        Args:
            indices: the windows.
            rows: positions of each; all if not given.
        """
        if not self.documents:
            return None
        rows = self.length_of(indices[0]) if rows is None else rows
        edges = [self._edges(index, rows) + number * rows for number, index in enumerate(indices)]
        starts, stops = (np.concatenate([part[place] for part in edges]) for place in (slice(-1), slice(1, None)))
        return Documents(tuple(starts.tolist()), tuple(stops.tolist()))

    def num_labels(self, indices: Sequence[int], window: tuple[int, int], samples: Sequence[int] | None = None) -> int:
        """Count the labels that :meth:`local` returns for the same arguments, without reading a token."""
        samples = samples if samples is not None else indices
        return sum(self._count(*part) for part in self._parts(indices, samples, *window))

    def num_bytes(self, labels: Tensor) -> int:
        """Return the bytes of text that ``labels`` stand for, a separator one; labels of −100 none."""
        ids = labels[labels != IGNORE_INDEX].numpy()
        return int(self._token_bytes[ids].sum())

    @cached_property
    def _token_bytes(self) -> Integers:
        return self.token_file.tokenizer.token_bytes()

    def _parts(
        self, indices: Sequence[int], samples: Sequence[int], start: int, stop: int
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yield index, sample and positions ``[first, last)`` of each window that rows ``[start, stop)`` contain."""
        if not self.documents:
            yield from ((index, sample, start, stop) for index, sample in zip(indices, samples, strict=True))
            return
        length = self.length_of(indices[0])
        # An empty slice is an empty part of one window.
        for number in range(start // length, max(-(-stop // length), start // length + 1)):
            first = number * length
            place = min(number, len(indices) - 1)
            yield indices[place], samples[place], max(start - first, 0), min(stop - first, length)

    def _edges(self, index: int, rows: int) -> Integers:
        """Return the edges of the documents in the first ``rows`` positions of a window, from 0 to ``rows``."""
        origin = self._first + index * self.sequence_length
        inside = self.token_file.edges_inside(origin, origin + rows - 1) - origin
        return np.concatenate([[0], inside, [rows]])

    def _count(self, index: int, sample: int, start: int, stop: int) -> int:
        """Count the labels of positions ``[start, stop)`` of a window."""
        if self._mask_id is not None:
            return int(self._is_masked(sample, start, stop).sum())
        if self.answers_only:
            return int(self._is_label(index, start, stop).sum())
        return stop - start - (len(self._last_tokens(index, start, stop)) if self.documents else 0)

    def _last_tokens(self, index: int, start: int, stop: int) -> Integers:
        """Return the positions in ``[start, stop)`` of a window at which documents end, counted from ``start``."""
        origin = self._first + index * self.sequence_length + start
        return self.token_file.edges_inside(origin, origin + stop - start) - origin - 1

    def _is_label(self, index: int, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Say which of the positions ``[start, stop)`` of a window predict an answer, ``(stop - start,)``."""
        origin = self._first + index * self.sequence_length
        found = self.token_file.is_answer(origin + start + 1, origin + stop + 1)
        if self.documents:
            found[self._last_tokens(index, start, stop)] = False
        return found

    def _is_masked(self, sample: int, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Say which of the positions ``[start, stop)`` of a sample are masked, ``(stop - start,)``."""
        masked: npt.NDArray[np.bool_] = hashed(self.seed, sample, np.arange(start, stop)) < _MASKED_BELOW
        return masked

    def _read(self, index: int, sample: int, start: int, stop: int) -> tuple[Integers, Integers]:
        """Return tokens and labels of positions ``[start, stop)`` of a window."""
        origin = self._first + index * self.sequence_length
        read = self._tokens(origin + start, origin + stop + 1)
        if self._mask_id is not None:
            return self._masked(read[:-1], self._is_masked(sample, start, stop))
        tokens, labels = read[:-1], read[1:]
        if self.answers_only:
            labels = np.where(self._is_label(index, start, stop), labels, IGNORE_INDEX)
        elif self.documents:
            labels = labels.copy()
            labels[self._last_tokens(index, start, stop)] = IGNORE_INDEX
        return tokens, labels

    def _masked(self, targets: Integers, masked: npt.NDArray[np.bool_]) -> tuple[Integers, Integers]:
        """Return the inputs and labels of tokens, of which some are masked."""
        assert self._mask_id is not None
        return np.where(masked, self._mask_id, targets), np.where(masked, targets, IGNORE_INDEX)

    def _tokens(self, first: int, last: int) -> Integers:
        """Read tokens ``[first, last)`` of the file."""
        self.token_file.check_size()
        read = self.token_file.tokens[first:last].astype(np.int64)
        if self._vocab_size is not None and read.max(initial=0) >= self._vocab_size:
            raise DataError(
                f"the tokens of {self.token_file.path} are damaged: its header promises ids up to "
                f"{self.token_file.header.max_id}, and there is a {read.max()}; copy it again or prepare it again"
            )
        return read


def _refuse_foreign_ids(token_file: TokenFile, vocab_size: int | None) -> None:
    """Compare the vocabulary with the largest id in the header, so that no step has to search its tokens."""
    if vocab_size is not None and token_file.header.max_id >= vocab_size:
        raise DataError(
            f"{token_file.path} holds the token id {token_file.header.max_id}, but the model's vocabulary ends at "
            f"{vocab_size - 1}; set model.vocab_size={token_file.tokenizer.vocab_size} or prepare the text with a "
            "smaller tokenizer"
        )
