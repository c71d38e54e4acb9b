"""Records, the keys and values of single (row, head) pairs, taken out of tensors and put into them.

On a GPU each of the three is one launch of a Triton kernel that waits for nothing on the host; elsewhere the same in
operations of torch. A record stands at a *place* ``row·Hkv + head`` of keys and values ``(B, rows, Hkv, D)``; packed
records are contiguous, ``(records, B, 2, D)``, keys then values, so that those for one rank are one message.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROWS = 8  # records, or places, of a program


@dataclass(frozen=True, eq=False)
class RecordGroups:
    """Which packed records belong to the same place, so that one sum of them is added there.

    Attributes:
        places: ``(places,)`` int64, each once.
        order: ``(records,)`` int64, the records by place; those of a place in the order of their ranks.
        starts: ``(places + 1,)`` int64, where the records of a place begin in ``order``, and their number at the end.
    """

    places: Tensor
    order: Tensor
    starts: Tensor


def pack(k: Tensor, v: Tensor, places: Tensor) -> Tensor:
    """The packed records at ``places`` ``(records,)`` int64 of ``k``, ``v``, which may be strided."""
    if _on_gpu(k):
        packed = k.new_empty(len(places), k.shape[0], 2, k.shape[3])
        _copy(packed, k, v, places, pack=True)
        return packed
    rows, heads = _split(places, k)
    return torch.stack([k[:, rows, heads], v[:, rows, heads]], 2).transpose(0, 1).contiguous()


def unpack(packed: Tensor, k: Tensor, v: Tensor, places: Tensor) -> None:
    """Write packed records to ``places`` of ``k``, ``v``, no two to the same."""
    if _on_gpu(k):
        _copy(packed, k, v, places, pack=False)
        return
    rows, heads = _split(places, k)
    for x, part in zip((k, v), packed.transpose(0, 1).unbind(2), strict=True):
        x[:, rows, heads] = part


def accumulate(packed: Tensor, k: Tensor, v: Tensor, groups: RecordGroups) -> None:
    """Add packed records to ``k``, ``v``: those of a place are summed first, in their own dtype."""
    if len(groups.places) == 0:
        return
    if _on_gpu(k):
        from longnet_dist.comm.records.triton import add_kernel

        add_kernel[_grid(groups.places, k)](
            packed, k, v, groups.places, groups.order, groups.starts, *_layout(groups.places, k, v)
        )
        return
    added = torch.segment_reduce(packed[groups.order], "sum", offsets=groups.starts, axis=0, unsafe=True, initial=0)
    rows, heads = _split(groups.places, k)
    for x, part in zip((k, v), added.transpose(0, 1).unbind(2), strict=True):
        x[:, rows, heads] = (x[:, rows, heads] + part).to(x.dtype)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and importlib.util.find_spec("triton") is not None


def _split(places: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Row and head of each place."""
    return places // k.shape[2], places % k.shape[2]


def _copy(packed: Tensor, k: Tensor, v: Tensor, places: Tensor, pack: bool) -> None:
    if len(places):
        from longnet_dist.comm.records.triton import copy_kernel

        copy_kernel[_grid(places, k)](packed, k, v, places, *_layout(places, k, v), PACK=pack)


def _grid(places: Tensor, k: Tensor) -> tuple[int, int]:
    return -(-len(places) // _ROWS), k.shape[0]


def _layout(places: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """The arguments of the kernels that describe ``k`` and ``v``."""
    batch, _, heads, dim = k.shape
    return k.stride()[:3], v.stride()[:3], len(places), batch, heads, dim, 1 << (dim - 1).bit_length(), _ROWS
