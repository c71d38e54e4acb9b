"""Batches of packed documents: how a call with ``cu_seqlens`` becomes calls on sequences with one list of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_dist.attention.stream import LayerCache
from longnet_dist.errors import ShapeError
from longnet_dist.geometry.documents import Documents, read_edges


class Item(NamedTuple):
    """Hold the tensors of one call, and the documents of its sequence."""

    qkv: tuple[Tensor, Tensor, Tensor]
    sink: Tensor | None
    documents: Documents | None


@dataclass(frozen=True)
class PackedBatch:
    """Say how the items of a batch are packed.

    Items with one list of documents are one call. Items with lists of their own lie one behind the other as one long
    sequence where this device holds them whole. Over ranks they are a call for each item, since each is cut at the same
    rows, and so they are where only the last rows have queries.

    Attributes:
        lists: the documents of all items, or of each; empty: every item is one document.
        rows: rows of an item, where the items become one sequence; else 0.
        fault: why the lists were refused; it is raised when all ranks know.
    """

    lists: tuple[Documents, ...] = ()
    rows: int = 0
    fault: ShapeError | None = None

    @classmethod
    def read(
        cls, cu_seqlens: Any, q: Tensor, k: Tensor, group: dist.ProcessGroup | None, cache: LayerCache | None
    ) -> PackedBatch:
        """Read ``cu_seqlens`` of a call on ``q (B, m, H, D)`` and ``k (B, n, Hkv, D)``, as in ``dilated_attention``."""
        if cu_seqlens is None or q.dim() != 4 or k.dim() != 4:
            return ONE_DOCUMENT
        if isinstance(cu_seqlens, Documents):
            return cls((cu_seqlens,))
        alone = group is None or dist.get_world_size(group) == 1
        try:
            edges = read_edges(cu_seqlens, q.shape[0], k.shape[1] if alone and cache is None else None)
        except ShapeError as error:
            return cls(fault=error)
        lists = tuple(map(Documents.of_edges, edges))
        if len(set(lists)) == 1:
            lists = lists[:1]
        if cache is not None and lists != (cache.stream.documents,):
            return cls(fault=_other_documents())
        return cls(lists, q.shape[1] if alone and len(lists) > 1 and q.shape[1] == k.shape[1] else 0)

    @property
    def digest(self) -> int:
        """Return an integer that is equal in all processes for equal lists; 0 without documents."""
        if not self.lists:
            return 0
        if len(self.lists) == 1:
            return self.lists[0].digest
        digests = repr([documents.digest for documents in self.lists])
        return int.from_bytes(hashlib.sha256(digests.encode()).digest()[:7], "big")

    @property
    def last_row(self) -> int:
        """Return the end of the last document."""
        return max((documents.stops[-1] for documents in self.lists), default=0)

    def items(self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> Iterator[Item]:
        """Yield the calls that compute the batch."""
        if len(self.lists) <= 1:
            yield Item((q, k, v), sink, self.lists[0] if self.lists else None)
        elif self.rows:
            qkv = tuple(x.flatten(0, 1)[None] if x.dim() == 4 else x for x in (q, k, v))
            yield Item((qkv[0], qkv[1], qkv[2]), _of_all(sink, q), one_sequence(self.lists, self.rows))
        else:
            for number, documents in enumerate(self.lists):
                part = slice(number, number + 1)
                of_item = sink[part] if sink is not None and sink.dim() == 3 else sink
                yield Item((q[part], k[part], v[part]), of_item, documents)

    def joined(self, parts: Sequence[tuple[Tensor, Tensor]], q: Tensor) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp of the batch from those of its calls."""
        out, lse = parts[0] if len(parts) == 1 else (torch.cat(x) for x in zip(*parts, strict=True))
        return (out.view(q.shape), lse.reshape(q.shape[:3])) if self.rows else (out, lse)


ONE_DOCUMENT = PackedBatch()
"""Every item is one document, as long as the sequence."""


def _other_documents() -> ShapeError:
    return ShapeError(
        "a stream has the documents of its whole sequence, but this call has others; leave cu_seqlens out, or give "
        "Stream the same"
    )


def documents_of_model(
    cu_seqlens: Any, batch: int, rows: int, group: dist.ProcessGroup | None, stream: object = None
) -> tuple[Documents | None, bool]:
    """Read the documents of a batch that passes through a model.

    Args:
        cu_seqlens: as in :func:`~longnet_dist.dilated_attention`.
        batch, rows: items, and tokens of an item on this rank.
        group: the sequence-parallel group.
        stream: the stream, or the texts that are decoded, of which these tokens are the next; None for neither.

    Returns:
        the documents, and whether the items are one sequence of ``batch · rows`` tokens then, since each has its own.

    Raises:
        ShapeError: lists that do not fit or are not the stream's, or, over ranks, items with lists of their own.
    """
    if cu_seqlens is None or isinstance(cu_seqlens, Documents) or torch.compiler.is_compiling():
        return cu_seqlens, False  # in a graph, each layer's operator reads them
    alone = group is None or dist.get_world_size(group) == 1
    lists = tuple(map(Documents.of_edges, read_edges(cu_seqlens, batch, rows if alone and stream is None else None)))
    if stream is not None and set(lists) != {getattr(stream, "documents", None)}:
        raise _other_documents()
    if len(set(lists)) == 1:
        return lists[0], False
    if not alone:
        raise ShapeError(
            f"over ranks all batch items must have the same documents, but the {batch} items have lists of their own; "
            f"pack them one behind the other into one item"
        )
    return one_sequence(lists, rows), True


def one_sequence(lists: Sequence[Documents], rows: int) -> Documents:
    """Return the documents of items of ``rows`` rows each, one behind the other."""
    starts = tuple(number * rows + row for number, documents in enumerate(lists) for row in documents.starts)
    stops = tuple(number * rows + row for number, documents in enumerate(lists) for row in documents.stops)
    return Documents(starts, stops)


def _of_all(sink: Tensor | None, q: Tensor) -> Tensor | None:
    """Return the sink of all rows of the batch, ``(1, B·n, H)``; one a head stays as it is."""
    if sink is None or sink.dim() not in (2, 3):
        return sink
    rows = sink.expand(q.shape[:3]) if tuple(sink.shape) in (tuple(q.shape[1:3]), tuple(q.shape[:3])) else sink
    return rows.reshape(1, -1, sink.shape[-1]) if rows.dim() == 3 else sink
