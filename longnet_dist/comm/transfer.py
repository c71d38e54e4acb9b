"""This module sends the sparse keys and values of shared segments between ranks, and buffers what arrives.

A segment is shared when it crosses the edge of a rank's slice, or of a chunk of a stream. The exchange has three
layers: a plan of integers (``geometry.exchange_plan``), the buffers and asynchronous transfers here, and the autograd
Function that uses both (``attention.functional``). See docs/internals.md, "The exchange".
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longnet_dist.caches import bounded_cache
from longnet_dist.comm.records.torch import RecordGroups, accumulate, pack, unpack
from longnet_dist.errors import ShapeError
from longnet_dist.geometry.exchange_plan import ExchangePlan, group_by_place
from longnet_dist.geometry.window import Segment


class CompactBuffers:
    """One tensor ``(2, B, slots, D)`` holds the compact keys and values of several segments, one segment after another.

    Slot ``i·Hkv + h`` of a segment is its kept row ``i`` of head ``h``. Slots to which no record was written are 0.

    Attributes:
        records: ``(2, B, slots, D)``, keys at index 0 and values at index 1.
    """

    # The heads of a row are adjacent, as in q, k and v, because the fastest attention kernels require it.

    def __init__(self, segments: tuple[Segment, ...], kv_heads: int, like: Tensor, dtype: torch.dtype) -> None:
        """Allocate zeroed slots.

        Args:
            segments: the segments, in the order in which they lie in ``records``.
            kv_heads: key/value heads ``Hkv``.
            like: ``(B, rows, Hkv, D)``; gives ``B``, ``D`` and the device.
            dtype: dtype of the records.
        """
        self._kv_heads = kv_heads
        self._slot_ranges: dict[tuple[int, int], slice] = {}
        self.records = like.new_zeros(2, like.shape[0], 0, like.shape[3], dtype=dtype)
        self.set_segments(segments)

    @classmethod
    def of(cls, segments: tuple[Segment, ...], records: Tensor) -> CompactBuffers:
        """Copy ``records`` ``(2, B, slots, D)``, which other buffers had for the same segments, into new buffers.

        Raises:
            ShapeError: the number of slots is not a multiple of the kept rows of the segments.
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
        """Allocate slots for exactly these segments; a segment that was present before keeps its records.

        A segment may also grow or shrink: in a stream, its stop moves with the chunk.
        """
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
        """Return keys and values, each ``(B, slots, 1, D)``: as for one head, with a slot in place of a row."""
        key, value = self.records.unsqueeze(3)
        return key, value

    def slots(self, plan: ExchangePlan) -> Tensor:
        """Return the slot in ``records`` of every record that the plan receives, ``(records,)`` int64."""
        firsts = tuple(self._slot_ranges[segment.branch, segment.index].start for segment in plan.segments)
        return _slots(plan, firsts, self.records.device)

    def views(self, segments: tuple[Segment, ...]) -> list[tuple[Tensor, Tensor]]:
        """Return views of the keys and the values of each segment, each ``(B, M, Hkv, D)``, without a copy.

        ``M`` is the kept rows up to the ``stop`` of the segment that is given, which may be before the buffer's.
        """
        views = []
        for segment in segments:
            first, rows = self._slot_ranges[segment.branch, segment.index].start, segment.compact_rows
            part = self.records[:, :, first : first + rows * self._kv_heads]
            key, value = torch.unflatten(part, 2, (rows, self._kv_heads))
            views.append((key, value))
        return views


class Gather:
    """A Gather sends sparse keys and values to the ranks that need them; its transfer starts when it is made.

    It is a collective: every rank of ``group`` must make one, in the same order. A rank receives
    ``sum(plan.receive_counts) · B · 2D`` numbers of the dtype of ``k``. Its backward is :class:`ReduceScatter`.

    Args:
        plan: what this rank sends and receives.
        group: the sequence group. None: there is one rank, which hands its records to itself, between the chunks of a
            stream.
        k: keys ``(B, n, Hkv, D)`` of this rank.
        v: values ``(B, n, Hkv, D)`` of this rank.
        overlap: let work that is queued before :meth:`wait` run during the transfer; else wait at once.
    """

    def __init__(
        self, plan: ExchangePlan, group: dist.ProcessGroup | None, k: Tensor, v: Tensor, overlap: bool
    ) -> None:
        self._plan = plan
        sent = pack(k, v, _send_places(plan, k.device))
        self._transfer = _Transfer(sent, plan.send_counts, plan.receive_counts, group, overlap)

    def wait(self, buffers: CompactBuffers) -> None:
        """Wait for the records and write them into ``buffers``, which must contain the plan's segments."""
        unpack(self._transfer.wait(), *buffers.keys_and_values, buffers.slots(self._plan))


class ReduceScatter:
    """A ReduceScatter sends the gradients of gathered records back to their owners: the backward of ``Gather``.

    It is a collective: every rank of ``group`` must make one. The bytes are those of :class:`Gather` in the other
    direction, in the dtype of ``gradients``.

    Args:
        plan: the plan of the :class:`Gather`.
        group: the sequence group, or None for one rank.
        gradients: gradients of the compact keys and values, float32 or float64.
        overlap: as for :class:`Gather`.
    """

    def __init__(
        self, plan: ExchangePlan, group: dist.ProcessGroup | None, gradients: CompactBuffers, overlap: bool
    ) -> None:
        self._groups = _groups(plan, gradients.records.device)
        sent = pack(*gradients.keys_and_values, gradients.slots(plan))
        self._transfer = _Transfer(sent, plan.receive_counts, plan.send_counts, group, overlap)

    def add_to(self, dk: Tensor, dv: Tensor) -> None:
        """Wait for the gradients and add them to ``dk`` and ``dv``, both ``(B, n, Hkv, D)``.

        What several ranks sent for the same row and head is summed in the order of the ranks, so that a run repeats
        bit by bit.
        """
        accumulate(self._transfer.wait(), dk, dv, self._groups)


class _Transfer:
    """One all-to-all of packed records, with a count of its own for each pair of ranks.

    On a GPU it runs on the CUDA stream of the group. ``wait`` makes the current stream wait, not the host.
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
        """Return the received records ``(records, B, 2, D)``; later calls return the same tensor."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._received


@bounded_cache(maxsize=64)
def _send_places(plan: ExchangePlan, device: torch.device) -> Tensor:
    """Copy the place of every record sent to the device, once for each plan."""
    return torch.from_numpy(plan.send_places).to(device)


@bounded_cache(maxsize=64)
def _groups(plan: ExchangePlan, device: torch.device) -> RecordGroups:
    """Group the gradients that come back by row and head: a row goes to each rank that needs it."""
    return RecordGroups(*(torch.from_numpy(x).to(device) for x in group_by_place(plan.send_places)))


@bounded_cache(maxsize=64)
def _slots(plan: ExchangePlan, first_slots: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the slot of every record received, where the plan's segments begin at ``first_slots`` in the buffer."""
    firsts = np.array(first_slots, np.int64)
    return torch.from_numpy(firsts[plan.receive_segments] + plan.receive_slots).to(device)
