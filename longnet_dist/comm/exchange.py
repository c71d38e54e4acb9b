"""The sparse rows of segments that are shared between ranks, or between the chunks of a stream, and their transfer.

Three layers: a plan of integers (``geometry.exchange``), the buffers and asynchronous transfers here, and the autograd
Function that uses them (``attention.functional``). See ARCHITECTURE.md, "The exchange".
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longnet_dist.errors import ShapeError
from longnet_dist.geometry.exchange import ExchangePlan
from longnet_dist.geometry.window import Segment


class CompactBuffers:
    """The compact buffers of some segments, side by side in one tensor ``(slots, B, 2D)``, keys then values.

    Slot ``i·Hkv + h`` of a segment's buffer is row ``i`` of head ``h``. Slots that no record has reached are 0.
    """

    def __init__(self, segments: tuple[Segment, ...], kv_heads: int, like: Tensor, dtype: torch.dtype) -> None:
        """Room for ``segments``, on the device of ``like`` ``(B, rows, Hkv, D)``."""
        self._kv_heads = kv_heads
        self._rooms: dict[tuple[int, int], slice] = {}
        self.records = like.new_zeros(0, like.shape[0], 2 * like.shape[3], dtype=dtype)
        self.hold(segments)

    @classmethod
    def of(cls, segments: tuple[Segment, ...], records: Tensor) -> CompactBuffers:
        """Buffers of ``segments`` that hold the ``records`` ``(slots, B, 2D)`` of other buffers of just these.

        Raises:
            ShapeError: the slots are not a number of heads times the rows of the segments.
        """
        rows = sum(segment.compact_rows for segment in segments)
        if records.dim() != 3 or len(records) == 0 or len(records) % rows:
            raise ShapeError(
                f"the {len(segments)} segments have {rows} rows a head, but the records are {tuple(records.shape)}"
            )
        like = records.new_empty(records.shape[1], 0, len(records) // rows, records.shape[2] // 2)
        buffers = cls(segments, like.shape[2], like, records.dtype)
        buffers.records.copy_(records)
        return buffers

    def hold(self, segments: tuple[Segment, ...]) -> None:
        """Make room for just these segments; those already here keep their records."""
        rooms, size = {}, 0
        for segment in segments:
            first, size = size, size + segment.compact_rows * self._kv_heads
            rooms[segment.branch, segment.index] = slice(first, size)
        if rooms == self._rooms:
            return
        old, old_rooms = self.records, self._rooms
        self.records, self._rooms = old.new_zeros(size, *old.shape[1:]), rooms
        for key in rooms.keys() & old_rooms.keys():
            kept = old[old_rooms[key]]
            self.records[rooms[key]][: len(kept)] = kept[: rooms[key].stop - rooms[key].start]

    def slots(self, plan: ExchangePlan) -> Tensor:
        """Slot in ``records`` of every record that the plan receives: ``(records,)`` int64."""
        firsts = tuple(self._rooms[segment.branch, segment.index].start for segment in plan.segments)
        return _slots(plan, firsts, self.records.device)

    def views(self, segments: tuple[Segment, ...]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``(B, M, Hkv, D)`` of each segment, up to its ``stop``."""
        views = []
        for segment in segments:
            first, rows = self._rooms[segment.branch, segment.index].start, segment.compact_rows
            part = self.records[first : first + rows * self._kv_heads].view(
                rows, self._kv_heads, *self.records.shape[1:]
            )
            key, value = part.permute(2, 0, 1, 3).chunk(2, dim=-1)
            views.append((key, value))
        return views


class Gather:
    """Keys and values on their way to the ranks that need them; every rank of ``group`` must start one.

    Rank ``p`` receives ``Σ plan.receive_counts · B · 2D`` numbers of the input dtype. Without a group the only rank
    hands its own records to itself: the chunk of a stream on one device.
    """

    def __init__(self, plan: ExchangePlan, group: dist.ProcessGroup | None, k: Tensor, v: Tensor) -> None:
        self._plan = plan
        rows, heads = _departures(plan, k.device)
        sent = torch.cat([k[:, rows, heads], v[:, rows, heads]], dim=-1).transpose(0, 1).contiguous()
        self._received, self._work = _all_to_all(sent, plan.send_counts, plan.receive_counts, group)

    def wait(self, buffers: CompactBuffers) -> None:
        """Put the records into ``buffers``, which must have room for the plan's segments."""
        if self._work:
            self._work.wait()
        buffers.records[buffers.slots(self._plan)] = self._received


class ReduceScatter:
    """Gradients of gathered records on their way back to the ranks that own the rows: the mirror of ``Gather``.

    Args:
        gradients: of all compact buffers, float32 or float64.
    """

    def __init__(self, plan: ExchangePlan, group: dist.ProcessGroup | None, gradients: CompactBuffers) -> None:
        self._rows, self._heads = _departures(plan, gradients.records.device)
        sent = gradients.records[gradients.slots(plan)]
        self._received, self._work = _all_to_all(sent, plan.receive_counts, plan.send_counts, group)

    def add_to(self, dk: Tensor, dv: Tensor) -> None:
        """Add what the ranks sent to contiguous ``dk``, ``dv`` ``(B, n, Hkv, D)``, in the order of ranks."""
        if self._work:
            self._work.wait()
        received = self._received.transpose(0, 1)
        index = self._rows * dk.shape[2] + self._heads
        for total, part in zip((dk, dv), received.chunk(2, dim=-1), strict=True):
            flat = total.view(total.shape[0], -1, total.shape[-1])
            if flat.is_cuda:  # index_add_ adds in any order there; this sorts first
                batch = torch.arange(len(flat), device=flat.device)[:, None]
                flat.index_put_((batch, index), part.to(flat.dtype), accumulate=True)
            else:
                flat.index_add_(1, index, part.to(flat.dtype))


def _all_to_all(
    sent: Tensor, send_counts: tuple[int, ...], receive_counts: tuple[int, ...], group: dist.ProcessGroup | None
) -> tuple[Tensor, dist.Work | None]:
    if group is None:
        return sent, None
    received = sent.new_empty(sum(receive_counts), *sent.shape[1:])
    work = dist.all_to_all_single(received, sent, list(receive_counts), list(send_counts), group=group, async_op=True)
    return received, work


@lru_cache(maxsize=64)
def _departures(plan: ExchangePlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Local row and head of every record sent."""
    return torch.from_numpy(plan.send_rows).to(device), torch.from_numpy(plan.send_heads).to(device)


@lru_cache(maxsize=64)
def _slots(plan: ExchangePlan, first_slots: tuple[int, ...], device: torch.device) -> Tensor:
    """Slot of every record received, where the buffers of the plan's segments begin at ``first_slots``."""
    firsts = np.array(first_slots, np.int64)
    return torch.from_numpy(firsts[plan.receive_segments] + plan.receive_slots).to(device)
