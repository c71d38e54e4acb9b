"""These functions pack and unpack records: a record is the key and the value of one row and one head.

The *place* of a record in keys and values ``(B, rows, Hkv, D)`` is ``row·Hkv + head``. Packed records are contiguous,
``(records, B, 2, D)``, keys before values, so that all records for one rank are one message. On a GPU each function is
one launch of a Triton kernel, without synchronizing the host; elsewhere it uses operations of torch.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longnet_dist.numerics import COMPILE

_ROWS = 8  # records (or places, when accumulating) of one Triton program


@dataclass(frozen=True, eq=False)
class RecordGroups:
    """The packed records are grouped by place, so that each place gets one sum of its records.

    Attributes:
        places: ``(places,)`` int64, the distinct places.
        order: ``(records,)`` int64, indices of the records, sorted by place, then by rank.
        starts: ``(places + 1,)`` int64: ``order[starts[i]:starts[i + 1]]`` are the records of ``places[i]``.
    """

    places: Tensor
    order: Tensor
    starts: Tensor


def pack(k: Tensor, v: Tensor, places: Tensor) -> Tensor:
    """Copy the records at ``places`` into a packed tensor.

    Args:
        k: keys ``(B, rows, Hkv, D)``; the strides of all dims but the last are free.
        v: values, like ``k``.
        places: ``(records,)`` int64.

    Returns:
        ``(records, B, 2, D)``, contiguous, in the dtype of ``k``.
    """
    if _on_gpu(k):
        packed = k.new_empty(len(places), k.shape[0], 2, k.shape[3])
        _copy(packed, k, v, places, pack=True)
        return packed
    rows, heads = _split(places, k)
    return torch.stack([k[:, rows, heads], v[:, rows, heads]], 2).transpose(0, 1).contiguous()


def unpack(packed: Tensor, k: Tensor, v: Tensor, places: Tensor) -> None:
    """Write packed records ``(records, B, 2, D)`` to the ``places`` ``(records,)`` int64 of ``k`` and ``v``.

    The places must differ from each other: the order of writes is not defined.
    """
    if _on_gpu(k):
        _copy(packed, k, v, places, pack=False)
        return
    rows, heads = _split(places, k)
    for x, part in zip((k, v), packed.transpose(0, 1).unbind(2), strict=True):
        x[:, rows, heads] = part


def accumulate(packed: Tensor, k: Tensor, v: Tensor, groups: RecordGroups) -> None:
    """Add packed records ``(records, B, 2, D)`` to ``k`` and ``v``.

    The records of a place are summed first, in the dtype of ``packed`` and in the order of ``groups``. Atomic additions
    would be simpler, but their order, and so the last bits of a gradient, would change from run to run.
    """
    if len(groups.places) == 0:
        return
    if _on_gpu(k):
        from longnet_dist.comm.records.triton import add_kernel

        add_kernel[_grid(groups.places, k)](
            packed, k, v, groups.places, groups.order, groups.starts, *_layout(groups.places, k, v), **COMPILE
        )
        return
    added = torch.segment_reduce(packed[groups.order], "sum", offsets=groups.starts, axis=0, unsafe=True, initial=0)
    rows, heads = _split(groups.places, k)
    for x, part in zip((k, v), added.transpose(0, 1).unbind(2), strict=True):
        x[:, rows, heads] = (x[:, rows, heads] + part).to(x.dtype)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and importlib.util.find_spec("triton") is not None


def _split(places: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row and the head of each place."""
    return places // k.shape[2], places % k.shape[2]


def _copy(packed: Tensor, k: Tensor, v: Tensor, places: Tensor, pack: bool) -> None:
    if len(places):
        from longnet_dist.comm.records.triton import copy_kernel

        copy_kernel[_grid(places, k)](packed, k, v, places, *_layout(places, k, v), PACK=pack, **COMPILE)


def _grid(places: Tensor, k: Tensor) -> tuple[int, int]:
    return -(-len(places) // _ROWS), k.shape[0]


def _layout(places: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """Return the kernel arguments that describe ``k`` and ``v``."""
    batch, _, heads, dim = k.shape
    return k.stride()[:3], v.stride()[:3], len(places), batch, heads, dim, 1 << (dim - 1).bit_length(), _ROWS
