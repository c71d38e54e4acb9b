"""How a batch of sequences lies in the rows that blocks compute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from longnet_dist.attention.packing import documents_of_model
from longnet_dist.errors import ShapeError
from longnet_dist.geometry.documents import Documents
from longnet_dist.geometry.window import Shards


@dataclass(frozen=True)
class BatchLayout:
    """A BatchLayout takes a batch ``(B, n, …)`` to the rows that blocks compute, and back.

    Items of unequal lengths lie one behind the other, without their padding. A cls row comes before each sequence.

    Attributes:
        batch, rows: items, and rows of an item as given.
        lengths: rows of each item that are not padding, where the items lie one behind the other; else None.
        documents: of the computed rows, cls rows included; None: every item is one document.
        joined: whether whole items lie one behind the other, padding included.
        cls_rows: 1 if this rank puts a cls row before each sequence, else 0.
        has_cls: whether sequences have a cls row, on this rank or another.
        window: this rank's slice of packed sequences, cls rows counted; None for batches of other kinds.
    """

    batch: int
    rows: int
    lengths: tuple[int, ...] | None = None
    documents: Documents | None = None
    joined: bool = False
    cls_rows: int = 0
    has_cls: bool = False
    window: tuple[int, int] | None = None

    @classmethod
    def packed(
        cls, packed: Documents | Sequence[int], batch: int, rows: int, has_cls: bool, group: dist.ProcessGroup | None
    ) -> BatchLayout:
        """Read ``packed``, an argument of :meth:`LongNetEncoder.forward`: the rows of each sequence, or documents.

        Raises:
            ShapeError: several items, lengths below 1, or another number of rows than this rank's slice has.
        """
        if not isinstance(packed, Documents):
            lengths = [length + has_cls for length in _checked(packed, len(packed), None)] if len(packed) else []
            packed = Documents.of_edges([0, *accumulate(lengths)]) if lengths else Documents((), ())
        if batch != 1 or not packed.starts:
            raise ShapeError(
                f"packed sequences are one item that holds at least one sequence, but there are {batch} items and "
                f"{len(packed.starts)} sequences"
            )
        start, stop = packed_window(packed, group)
        layout = cls(batch, rows, None, packed, has_cls=has_cls, window=(start, stop))
        if (needed := stop - start - len(layout.cls_places)) != rows:
            raise ShapeError(
                f"this rank's slice of the packed sequences is rows [{start}, {stop}) of {packed.stops[-1]}, of which "
                f"{needed} are no cls rows, but {rows} rows are given"
            )
        return layout

    @classmethod
    def of(
        cls, batch: int, rows: int, lengths: Any, cu_seqlens: Any, has_cls: bool, group: dist.ProcessGroup | None
    ) -> BatchLayout:
        """Read ``lengths`` or ``cu_seqlens`` of a batch; arguments of :meth:`LongNetEncoder.forward`.

        Raises:
            ShapeError: lengths or edges that do not fit, both of them, or edges with cls rows.
        """
        alone = group is None or dist.get_world_size(group) == 1
        cls_rows = int(has_cls and (alone or dist.get_rank(group) == 0))
        if cu_seqlens is not None:
            if lengths is not None or has_cls:
                what = (
                    "lengths are given too" if lengths is not None else "its model has a cls row before each sequence"
                )
                raise ShapeError(f"a batch has cu_seqlens, but {what}; give lengths alone")
            documents, joined = documents_of_model(cu_seqlens, batch, rows, group)
            return cls(batch, rows, None, documents, joined)
        if lengths is None:
            return cls(batch, rows, cls_rows=cls_rows, has_cls=has_cls)
        found = _checked(lengths, batch, rows if alone else None)
        if alone and set(found) == {rows}:
            return cls(batch, rows, cls_rows=cls_rows, has_cls=has_cls)
        if alone:
            edges = [0]
            for length in found:
                edges.append(edges[-1] + length + cls_rows)
            return cls(batch, rows, found, Documents.of_edges(edges), cls_rows=cls_rows, has_cls=has_cls)
        if len(set(found)) > 1:
            raise ShapeError(
                f"over ranks all batch items must have the same length, but they have {list(found)}; give one item a "
                f"call, or pack them with cu_seqlens"
            )
        return cls(batch, rows, None, Documents((0,), (found[0] + has_cls,)), cls_rows=cls_rows, has_cls=has_cls)

    @property
    def computed_rows(self) -> int:
        """Return the rows ``S`` of a computed item on this rank."""
        if self.window is not None:
            return self.window[1] - self.window[0]
        if self.lengths is not None:
            return sum(self.lengths) + len(self.lengths) * self.cls_rows
        return self.batch * self.rows if self.joined else self.rows + self.cls_rows

    @property
    def cls_places(self) -> tuple[int, ...]:
        """Return the places of cls rows in this rank's slice of packed sequences."""
        if self.window is None or not self.has_cls or self.documents is None:
            return ()
        start, stop = self.window
        return tuple(first - start for first in self.documents.starts if start <= first < stop)

    @property
    def parts(self) -> tuple[int, ...]:
        """Return the rows that this rank has of each sequence of one item, without cls rows; empty: items are whole."""
        if self.window is None or self.documents is None:
            return self.lengths or ()
        start, stop = self.window
        cuts = zip(self.documents.starts, self.documents.stops, strict=True)
        parts = (min(last, stop) - max(first + self.has_cls, start) for first, last in cuts)
        return tuple(rows for rows in parts if rows > 0)

    def enter(self, x: Tensor) -> Tensor:
        """Return the computed rows ``(B', S, …)`` of ``x (B, n, …)``, without cls rows."""
        if self.lengths is not None:
            return torch.cat([item[:length] for item, length in zip(x, self.lengths, strict=True)])[None]
        return x.flatten(0, 1)[None] if self.joined else x

    def add_cls(self, x: Tensor, row: Tensor) -> Tensor:
        """Put ``row (1, 1, …)`` before each sequence of ``x (B', S, …)``."""
        if self.cls_places:
            edges = [place - number for number, place in enumerate(self.cls_places)]
            first, *pieces = torch.tensor_split(x, edges, dim=1)
            return torch.cat([first, *(piece for part in pieces for piece in (row, part))], 1)
        if not self.cls_rows:
            return x
        if self.lengths is None:
            return torch.cat([row.expand(len(x), *row.shape[1:]), x], 1)
        parts = torch.split(x, list(self.lengths), dim=1)
        return torch.cat([piece for part in parts for piece in (row, part)], 1)

    def leave(self, x: Tensor) -> Tensor:
        """Return ``(B, n + cls_rows, …)`` for computed rows ``(B', S, …)``; padding is 0."""
        if self.lengths is not None:
            sizes = [length + self.cls_rows for length in self.lengths]
            whole = self.rows + self.cls_rows
            parts = torch.split(x[0], sizes)
            return torch.stack([F.pad(part, (0, 0, 0, whole - len(part))) for part in parts])
        return torch.unflatten(x[0], 0, (self.batch, self.rows)) if self.joined else x

    def sequences(self, total_rows: int) -> list[tuple[int, int]]:
        """Return first row and end of each sequence in the computed rows of an item, ``total_rows`` over all ranks."""
        if self.documents is None:
            return [(0, total_rows)]
        return list(zip(self.documents.starts, self.documents.stops, strict=True))


def packed_window(packed: Documents, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return first row and end of this rank's slice of packed sequences, cls rows counted.

    Args:
        packed: all sequences, cls rows included.
        group: the sequence-parallel group, whose ranks hold slices of equal length; the last may be shorter.

    Raises:
        ShapeError: there are fewer rows than ranks need.
    """
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    return Shards.even(packed.stops[-1], ranks).window(rank)


def _checked(lengths: Any, batch: int, rows: int | None) -> tuple[int, ...]:
    values = lengths.tolist() if hasattr(lengths, "tolist") else lengths
    values = list(values) if isinstance(values, Iterable) else [values]
    if len(values) != batch or any(isinstance(x, bool) or not hasattr(x, "__index__") for x in values):
        raise ShapeError(f"lengths must be an integer for each of the {batch} batch items, but are {values}")
    if min(values) < 1 or (rows is not None and max(values) > rows):
        most = "" if rows is None else f" and at most the {rows} rows of an item"
        raise ShapeError(f"lengths must be at least 1{most}, but are {values}")
    return tuple(x.__index__() for x in values)
