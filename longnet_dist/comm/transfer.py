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

from longnet_dist.comm.records.torch import RecordGroups, accumulate, pack, unpack
from longnet_dist.errors import ShapeError
from longnet_dist.geometry.exchange_plan import ExchangePlan, group_by_place
from longnet_dist.geometry.window import Segment


class CompactBuffers:
    """The compact buffers of some segments, side by side in one tensor ``(2, B, slots, D)``, keys then values.

    Slot ``i·Hkv + h`` of a segment's buffer is row ``i`` of head ``h``: rows lie as in ``k`` and ``v``, which the
    fastest kernels ask for. Slots that no record has reached are 0.
    """

    def __init__(self, segments: tuple[Segment, ...], kv_heads: int, like: Tensor, dtype: torch.dtype) -> None:
        """Room for ``segments``, on the device of ``like`` ``(B, rows, Hkv, D)``."""
        self._kv_heads = kv_heads
        self._slot_ranges: dict[tuple[int, int], slice] = {}
        self.records = like.new_zeros(2, like.shape[0], 0, like.shape[3], dtype=dtype)
        self.set_segments(segments)

    @classmethod
    def of(cls, segments: tuple[Segment, ...], records: Tensor) -> CompactBuffers:
        """Buffers of ``segments`` that hold the ``records`` ``(2, B, slots, D)`` of other buffers of just these.

        Raises:
            ShapeError: the slots are not a number of heads times the rows of the segments.
        """
        rows = sum(segment.compact_rows for segment in segments)
        if records.dim() != 4 or len(records) != 2 or records.shape[2] == 0 or records.shape[2] % rows:
            raise ShapeError(
                f"the {len(segments)} segments have {rows} rows a head, but the records are {tuple(records.shape)}"
            )
        _, batch, slots, dim = records.shape
        buffers = cls(segments, slots // rows, records.new_empty(batch, 0, slots // rows, dim), records.dtype)
        buffers.records.copy_(records)
        return buffers

    def set_segments(self, segments: tuple[Segment, ...]) -> None:
        """Make room for just these segments; those already here keep their records."""
        ranges, size = {}, 0
        for segment in segments:
            first, size = size, size + segment.compact_rows * self._kv_heads
            ranges[segment.branch, segment.index] = slice(first, size)
        if ranges == self._slot_ranges:
            return
        old, old_ranges = self.records, self._slot_ranges
        self.records, self._slot_ranges = old.new_zeros(2, old.shape[1], size, old.shape[3]), ranges
        for key in ranges.keys() & old_ranges.keys():
            kept = old[:, :, old_ranges[key]][:, :, : ranges[key].stop - ranges[key].start]
            self.records[:, :, ranges[key]][:, :, : kept.shape[2]] = kept

    @property
    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, ``(B, slots, 1, D)``."""
        key, value = self.records.unsqueeze(3)
        return key, value

    def slots(self, plan: ExchangePlan) -> Tensor:
        """Slot in ``records`` of every record that the plan receives: ``(records,)`` int64."""
        firsts = tuple(self._slot_ranges[segment.branch, segment.index].start for segment in plan.segments)
        return _slots(plan, firsts, self.records.device)

    def views(self, segments: tuple[Segment, ...]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``(B, M, Hkv, D)`` of each segment, up to its ``stop``."""
        views = []
        for segment in segments:
            first, rows = self._slot_ranges[segment.branch, segment.index].start, segment.compact_rows
            part = self.records[:, :, first : first + rows * self._kv_heads]
            key, value = torch.unflatten(part, 2, (rows, self._kv_heads))
            views.append((key, value))
        return views


class Gather:
    """Keys and values on their way to the ranks that need them; every rank of ``group`` must start one.

    Rank ``p`` receives ``Σ plan.receive_counts · B · 2D`` numbers of the input dtype. Without a group the only rank
    hands its own records to itself: the chunk of a stream on one device. What is computed between the start and
    :meth:`wait` runs beside the transfer, unless ``overlap`` is false.
    """

    def __init__(
        self, plan: ExchangePlan, group: dist.ProcessGroup | None, k: Tensor, v: Tensor, overlap: bool
    ) -> None:
        self._plan = plan
        sent = pack(k, v, _send_places(plan, k.device))
        self._transfer = _Transfer(sent, plan.send_counts, plan.receive_counts, group, overlap)

    def wait(self, buffers: CompactBuffers) -> None:
        """Put the records into ``buffers``, which must have room for the plan's segments."""
        unpack(self._transfer.wait(), *buffers.keys_and_values, buffers.slots(self._plan))


class ReduceScatter:
    """Gradients of gathered records on their way back to the ranks that own the rows: the mirror of ``Gather``.

    Args:
        gradients: of all compact buffers, float32 or float64.
    """

    def __init__(
        self, plan: ExchangePlan, group: dist.ProcessGroup | None, gradients: CompactBuffers, overlap: bool
    ) -> None:
        self._groups = _groups(plan, gradients.records.device)
        sent = pack(*gradients.keys_and_values, gradients.slots(plan))
        self._transfer = _Transfer(sent, plan.receive_counts, plan.send_counts, group, overlap)

    def add_to(self, dk: Tensor, dv: Tensor) -> None:
        """Add what the ranks sent to ``dk``, ``dv`` ``(B, n, Hkv, D)``: for each row one sum in a fixed order."""
        accumulate(self._transfer.wait(), dk, dv, self._groups)


class _Transfer:
    """One variable all-to-all of packed records.

    On a GPU it runs on the group's own stream, and waiting for it is left to the stream that waits: the host goes on.
    """

    def __init__(
        self,
        sent: Tensor,
        send_counts: tuple[int, ...],
        receive_counts: tuple[int, ...],
        group: dist.ProcessGroup | None,
        overlap: bool,
    ) -> None:
        self._received, self._work = sent, None
        if group is not None:
            self._received = sent.new_empty(sum(receive_counts), *sent.shape[1:])
            counts = list(receive_counts), list(send_counts)
            self._work = dist.all_to_all_single(self._received, sent, *counts, group=group, async_op=True)
        if not overlap:
            self.wait()

    def wait(self) -> Tensor:
        """What was received."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._received


@lru_cache(maxsize=64)
def _send_places(plan: ExchangePlan, device: torch.device) -> Tensor:
    """Place of every record sent."""
    return torch.from_numpy(plan.send_places).to(device)


@lru_cache(maxsize=64)
def _groups(plan: ExchangePlan, device: torch.device) -> RecordGroups:
    """Which of the gradients that come back belong to the same row and head."""
    return RecordGroups(*(torch.from_numpy(x).to(device) for x in group_by_place(plan.send_places)))


@lru_cache(maxsize=64)
def _slots(plan: ExchangePlan, first_slots: tuple[int, ...], device: torch.device) -> Tensor:
    """Slot of every record received, where the buffers of the plan's segments begin at ``first_slots``."""
    firsts = np.array(first_slots, np.int64)
    return torch.from_numpy(firsts[plan.receive_segments] + plan.receive_slots).to(device)
