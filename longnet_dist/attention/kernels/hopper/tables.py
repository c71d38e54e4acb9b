"""The tiles of a piece whose segments are of unequal lengths, in the order in which programs take them.

A launch has one program for each tile of each (batch, head). Without a table all segments count as whole ones, so that
documents of a few tokens would leave most programs without work. A table lists only tiles that have some.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longnet_dist.attention.kernels.triton.launch import rows_of_segments
from longnet_dist.caches import bounded_cache
from longnet_dist.geometry.documents import Integers
from longnet_dist.geometry.window import Piece


class TileTable(NamedTuple):
    """The tiles of a launch.

    Attributes:
        tiles: their number, for each (batch, head).
        integers: ``(4 · tiles,)`` int64 on the device: the first row, the end and the lead of the segment of each tile,
            as in a ``SegmentTable``, then the number of each tile in its segment.
    """

    tiles: int
    integers: Tensor


@bounded_cache(maxsize=128)
def tile_table(piece: Piece, of_queries: bool, rows: int, fresh: bool, device: torch.device) -> TileTable:
    """Return :func:`listed_tiles`, of the same arguments, on a device."""
    integers = listed_tiles(piece, of_queries, rows, fresh)
    return TileTable(len(integers) // 4, _on_device(integers, device))


@bounded_cache(maxsize=512)
def listed_tiles(piece: Piece, of_queries: bool, rows: int, fresh: bool) -> Integers:
    """List the tiles of a piece that has a table of segments, those of the longest segment first.

    The tiles of a segment stay together, because they read the same keys or queries. The one with the most work in a
    causal model comes first: the last queries, or the first keys.

    The list takes longer than its copy to a device, so it is made ahead of the launch where that is possible
    (:meth:`Kernel.prepare`).

    Args:
        piece: what is launched.
        of_queries: whether the programs take tiles of queries; else of keys.
        rows: of a tile.
        fresh: whether tiles without work are listed too, because the launch writes all rows.

    Returns:
        the integers of a :class:`TileTable`.
    """
    assert piece.table is not None
    table = piece.table
    queries, keys = rows_of_segments(piece)
    own, other = (queries, keys) if of_queries else (keys, queries)
    busy = np.flatnonzero((own > 0) & ((other > 0) | fresh))
    if not len(busy):
        return busy
    order = busy[np.argsort(table.starts[busy] - table.stops[busy])]
    # A tile has rows · r rows of the segment, of which it keeps every r-th.
    counts = -(-own[order] // (rows * piece.dilation_rate))
    tiles = int(counts.sum())
    integers = np.empty(4 * tiles, np.int64)
    segments, number = integers[: 3 * tiles].reshape(-1, 3), integers[3 * tiles :]
    place = np.repeat(order, counts)
    for column, bounds in enumerate((table.starts, table.stops, table.leads)):
        segments[:, column] = bounds[place]
    last = np.repeat(np.cumsum(counts) - 1, counts)
    np.subtract(last, np.arange(tiles), number)
    if not of_queries:
        np.subtract(np.repeat(counts - 1, counts), number, number)
    return integers


def _on_device(integers: Integers, device: torch.device) -> Tensor:
    return torch.from_numpy(integers).to(device)
