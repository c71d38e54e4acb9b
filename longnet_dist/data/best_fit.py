"""Best-fit packing fills windows with whole documents, so that few are cut and little is padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from longnet_dist.data.shuffle import permuted
from longnet_dist.data.token_file import SplitName, TokenFile
from longnet_dist.data.windows import IGNORE_INDEX, Integers, Windows
from longnet_dist.errors import DataError


class FittedWindows(Windows):
    """A split is packed into windows of ``N`` tokens by best-fit decreasing (arXiv 2404.10830).

    A document longer than ``N`` is cut at every ``N``-th token; no other document is cut. The pieces, longest first,
    each go into the window with the least room that is enough. What is left of a window is padding, without labels. The
    seed decides which of equally long pieces meet in a window.

    Args:
        token_file, split, sequence_length, seed, options: as for :class:`~longnet_dist.data.windows.Windows`.

    Attributes:
        cut_share: share of the documents that are cut.
        padding_share: share of the positions of all windows that are padding.
    """

    def __init__(
        self, token_file: TokenFile, split: SplitName, sequence_length: int, *, seed: int = 0, **options: Any
    ) -> None:
        if token_file.answers is not None:
            raise DataError(
                f"data.packing=best_fit takes the windows of {token_file.path} apart, whose answers are in them; use "
                f"data.packing=contiguous"
            )
        super().__init__(token_file, split, sequence_length, seed=seed, **options, documents=True)
        first, last = token_file.split(split)
        edges = np.concatenate([[first], token_file.edges_inside(first, last - 1), [last]])
        self._starts, lengths, self._goes_on = _pieces(edges, sequence_length)
        windows = best_fit(lengths, sequence_length, seed)
        order = np.lexsort((permuted(np.arange(len(lengths)), len(lengths), seed), windows))
        self._starts, lengths, self._goes_on = self._starts[order], lengths[order], self._goes_on[order]
        counts = np.bincount(windows)
        self._bounds = np.concatenate([[0], np.cumsum(counts)])
        self._lengths = lengths
        num_cut = int((np.diff(edges) > sequence_length).sum())
        self.cut_share = num_cut / (len(edges) - 1)
        self.padding_share = 1 - int(lengths.sum()) / (len(counts) * sequence_length)

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self._bounds) - 1

    @property
    def num_full(self) -> int:
        """Return the number of windows, which all count ``sequence_length`` tokens."""
        return len(self)

    def length_of(self, index: int) -> int:
        """Return the tokens of window ``index`` with its padding."""
        return self.sequence_length

    def _pieces(self, index: int) -> tuple[Integers, Integers, Integers]:
        """Return the pieces of a window: their first tokens in the file, edges in the window, and ends of documents.

        The last are the positions of tokens that predict nothing.
        """
        part = slice(self._bounds[index], self._bounds[index + 1])
        edges = np.concatenate([[0], np.cumsum(self._lengths[part])])
        return self._starts[part], edges, edges[1:][~self._goes_on[part]] - 1

    def _edges(self, index: int, rows: int) -> Integers:
        _, edges, _ = self._pieces(index)
        return np.unique(np.minimum(edges, rows))

    def _count(self, index: int, sample: int, start: int, stop: int) -> int:
        _, edges, ends = self._pieces(index)
        filled = max(min(stop, int(edges[-1])), start)
        if self._mask_id is not None:
            return int(self._is_masked(sample, start, filled).sum())
        return filled - start - int(((ends >= start) & (ends < stop)).sum())

    def _read(self, index: int, sample: int, start: int, stop: int) -> tuple[Integers, Integers]:
        starts, edges, ends = self._pieces(index)
        tokens, labels = np.zeros(stop - start, np.int64), np.full(stop - start, IGNORE_INDEX, np.int64)
        firsts, lasts = np.maximum(edges[:-1], start), np.minimum(edges[1:], stop)
        for number in np.flatnonzero(firsts < lasts):
            first, last = int(firsts[number]), int(lasts[number])
            place = int(starts[number]) + first - int(edges[number])
            read = self._tokens(place, place + last - first + 1)
            rows = slice(first - start, last - start)
            tokens[rows] = read[: last - first]
            # The last token of the file has no successor; it ends a document.
            labels[first - start : first - start + len(read) - 1] = read[1:]
        if self._mask_id is not None:
            filled = np.arange(start, stop) < edges[-1]
            return self._masked(tokens, self._is_masked(sample, start, stop) & filled)
        labels[ends[(ends >= start) & (ends < stop)] - start] = IGNORE_INDEX
        return tokens, labels


def _pieces(edges: Integers, length: int) -> tuple[Integers, Integers, npt.NDArray[np.bool_]]:
    """Cut the documents between ``edges`` at every ``length``-th token.

    Returns:
        first token and length of each piece, and whether its document goes on behind it.
    """
    lengths = np.diff(edges)
    counts = -(-lengths // length)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = edges[document] + number * length
    stops = np.minimum(starts + length, edges[document + 1])
    return starts, stops - starts, stops < edges[document + 1]


def best_fit(lengths: Integers, room: int, seed: int) -> Integers:
    """Assign pieces to windows by best-fit decreasing.

    The windows of equal room are one class, and equally long pieces are placed together. So the time does not grow with
    the number of pieces, except for sorting.

    Args:
        lengths: (n,) lengths, from 1 to ``room``.
        room: tokens of a window.
        seed: decides the order of equally long pieces.

    Returns:
        (n,) number of the window of each piece.
    """
    order = np.lexsort((permuted(np.arange(len(lengths)), len(lengths), seed, 1), -lengths))
    by_length = lengths[order]
    firsts = np.flatnonzero(np.diff(by_length, prepend=room + 1))
    windows = np.empty(len(lengths), np.int64)
    num_windows = 0
    open_windows: dict[int, Integers] = {}  # room that is left: the windows with so much
    rooms = 0  # bit r is set if open_windows has windows with room r
    for first, last in zip(firsts.tolist(), [*firsts[1:].tolist(), len(lengths)], strict=True):
        length = int(by_length[first])
        while first < last:
            fitting = rooms >> length
            if fitting:
                left = length + (fitting & -fitting).bit_length() - 1
                candidates = open_windows[left]
            else:
                left = room
                candidates = np.arange(num_windows, num_windows + -(-(last - first) // (room // length)))
                num_windows += len(candidates)
            each = left // length
            used, rest = np.split(candidates, [-(-(last - first) // each)])
            filled = np.repeat(used, each)[: last - first]
            windows[order[first : first + len(filled)]] = filled
            first += len(filled)
            rooms = _put(open_windows, rooms, left, rest, replace=True)
            counts = np.full(len(used), each)
            counts[-1] -= len(used) * each - len(filled)
            for count in {each, int(counts[-1])}:
                rooms = _put(open_windows, rooms, left - count * length, used[counts == count])
    return windows


def _put(open_windows: dict[int, Integers], rooms: int, left: int, windows: Integers, replace: bool = False) -> int:
    """Note windows with room ``left``; return the set of rooms that windows have."""
    if left == 0:
        return rooms
    before = open_windows.pop(left, None)
    if before is not None and not replace:
        windows = np.concatenate([before, windows])
    if len(windows):
        open_windows[left] = windows
        return rooms | 1 << left
    return rooms & ~(1 << left)
