"""Edges of the documents of a batch with padding, packed texts, or both."""

from __future__ import annotations

from torch import Tensor

from longnet_dist.hf.operator import Edges, edges_of


def edges_of_batch(mask: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor | None, columns: int) -> Edges:
    """Return the edges of the documents of a batch, as ``cu_seqlens`` of a model; None: every item is one.

    Args:
        mask: ``(B, columns)``, true for tokens; None: no padding.
        position_ids: ``(B, columns)``; a document begins where they do not grow by 1.
        cu_seqlens: ``(documents + 1,)`` edges of one item; mask and positions are not read then.
        columns: of the batch.

    Raises:
        ShapeError: a mask with gaps, or without a token.
    """
    padded = edges_of(mask, None, cu_seqlens, columns, columns)
    if cu_seqlens is not None or position_ids is None:
        return padded
    packed = edges_of(None, position_ids, None, columns, columns)
    if padded is None or packed is None:
        return packed if padded is None else padded
    return [_joined(run, edges) for run, edges in zip(_lists(padded), _lists(packed), strict=True)]


def _lists(edges: list[int] | list[list[int]]) -> list[list[int]]:
    return edges if isinstance(edges[0], list) else [edges]  # type: ignore[list-item, return-value]


def _joined(run: list[int], edges: list[int]) -> list[int]:
    """Return the edges of the documents within a run of tokens."""
    start, stop = run
    return [start, *(edge for edge in edges if start < edge < stop), stop]
