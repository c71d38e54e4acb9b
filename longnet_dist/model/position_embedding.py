"""Positions that are added to the embedded rows: learned vectors, or sines and cosines of coordinates."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from longnet_dist.errors import ShapeError
from longnet_dist.geometry.documents import Documents

_TILE_ROWS = 16384
"""Rows whose angles are computed at once, in float64."""


class LearnedPositions(nn.Embedding):
    """Add a learned vector for each place in a sequence.

    Args:
        number: of vectors.
        dim: model dim ``E``.
        offset: number of the vector of the first row.
    """

    def __init__(self, number: int, dim: int, offset: int) -> None:
        super().__init__(number, dim)
        self.offset = offset
        nn.init.normal_(self.weight, std=0.02)

    def places(self, start: int, rows: int, total_rows: int, documents: Documents | None) -> Tensor:
        """Return the number ``(n,)`` of the vector of each row of window ``start … start+rows-1``.

        Raises:
            ShapeError: a sequence has more rows than there are vectors.
        """
        longest = total_rows if documents is None else documents.longest
        if longest > (most := self.num_embeddings - self.offset):
            raise ShapeError(f"there are learned positions for {most} rows, but the sequence has {longest}")
        # Padding, which nobody sees, may lie further behind.
        return row_places(start, rows, documents, self.weight.device).clamp(max=most - 1) + self.offset


def row_places(start: int, rows: int, documents: Documents | None, device: torch.device) -> Tensor:
    """Return the number ``(n,)`` of each row in its document, for rows ``start … start+rows-1`` of a sequence."""
    numbers = np.arange(start, start + rows)
    if documents is not None:
        document = np.searchsorted(documents.array_starts, numbers, side="right") - 1
        numbers = numbers - np.where(document < 0, 0, documents.array_starts[document])
    return torch.from_numpy(numbers).to(device)


def tile_places(coords: Tensor, tile_size: float) -> Tensor:
    """Return the whole tiles ``(…, C)`` in which coordinates ``(…, C)`` lie, float64."""
    return torch.floor(coords.double() / tile_size)


def warn_of_coincidences(places: Tensor, tile_size: float) -> None:
    """Warn if rows of one sequence, ``places (n, C)`` in tiles, lie at the same place."""
    shared = len(places) - len(torch.unique(places, dim=0))
    if shared:
        warnings.warn(
            f"{shared} of {len(places)} coordinates land on a place that another row has, so their positions are the "
            f"same; tile_size={tile_size:g} must be the side of a tile, in the pixels of the coordinates",
            stacklevel=2,
        )


def sincos(coords: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    r"""Return sines and cosines ``(…, E)`` of coordinates ``(…, C)``.

    A coordinate :math:`x` has :math:`h = ⌊E / 2C⌋` frequencies: :math:`\sin(x ω_i)` for all :math:`i`, then
    :math:`\cos(x ω_i)`, with :math:`ω_i = 10000^{-i/h}`. The last coordinate's channels come first, as in tables of
    images (y before x). Channels that are left over are 0.

    Args:
        coords: real numbers.
        dim: model dim ``E``.
        dtype: of the result; angles are float64.
    """
    number = coords.shape[-1]
    half = dim // (2 * number)
    frequencies = 10000 ** -(torch.arange(half, device=coords.device, dtype=torch.float64) / half)
    rows = coords.reshape(-1, number)
    result = torch.zeros(len(rows), dim, dtype=dtype, device=coords.device)
    for first in range(0, len(rows), _TILE_ROWS):
        part = rows[first : first + _TILE_ROWS].double().flip(-1).unsqueeze(-1) * frequencies  # (rows, C, h)
        waves = torch.cat([part.sin(), part.cos()], -1).flatten(1)
        result[first : first + _TILE_ROWS, : waves.shape[1]] = waves
    return result.view(*coords.shape[:-1], dim)
