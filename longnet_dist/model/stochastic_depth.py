"""Stochastic depth (arXiv 1603.09382): in training a sub-layer is left out for some sequences."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longnet_dist.errors import ShapeError
from longnet_dist.geometry.documents import Documents


def stochastic_depth(
    x: Tensor, rate: float, documents: Documents | None, start: int | None, group: dist.ProcessGroup | None
) -> Tensor:
    """Set ``x (B, n, E)`` to 0 for each sequence with probability ``rate``; multiply the others by ``1 / (1 - rate)``.

    Packed documents are drawn one by one. Ranks that share a sequence take the draws of the group's first rank.

    Raises:
        ShapeError: packed documents over ranks, without ``start``, the global row of the first row here.
    """
    batch, rows, _ = x.shape
    keep = (torch.rand(batch, len(documents.starts) if documents else 1, device=x.device) >= rate).to(x.dtype)
    if group is not None and dist.get_world_size(group) > 1:
        if documents and start is None:
            raise ShapeError("stochastic depth over ranks with packed documents needs the first row; pass start")
        dist.broadcast(keep, group=group, group_src=0)
    keep /= 1 - rate
    if documents:
        global_rows = np.arange(rows) + (start or 0)
        number = np.searchsorted(documents.array_starts, global_rows, side="right") - 1
        keep = keep[:, torch.from_numpy(number.clip(0)).to(x.device)]
    return x * keep.unsqueeze(-1)
