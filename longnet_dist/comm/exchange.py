"""The sparse exchange of keys and values between the ranks of a sequence group.

Three layers: a plan of integers (``geometry.exchange``), the asynchronous transfers here, and the autograd Function that
uses them (``attention.functional``). See ARCHITECTURE.md, "The exchange".
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_dist.geometry.exchange import ExchangePlan
from longnet_dist.kernels.contract import wide_dtype


class Gather:
    """Keys and values on their way to the ranks that need them; every rank of ``group`` must start one.

    Rank ``p`` receives ``Σ plan.receive_counts · B · 2D`` numbers of the input dtype.
    """

    def __init__(self, plan: ExchangePlan, group: dist.ProcessGroup, k: Tensor, v: Tensor) -> None:
        self._plan = plan
        rows, heads, self._slots = _on_device(plan, k.device)
        sent = torch.cat([k[:, rows, heads], v[:, rows, heads]], dim=-1).transpose(0, 1).contiguous()
        self._received, self._work = _all_to_all(sent, plan.send_counts, plan.receive_counts, group)
        self._kv_heads = k.shape[2]

    def wait(self) -> tuple[list[Tensor], list[Tensor]]:
        """Compact buffers ``(B, M, Hkv, D)`` of keys and of values, one each for every shared segment of the plan."""
        self._work.wait()
        buffer = self._received.new_zeros(self._plan.num_slots, *self._received.shape[1:])
        buffer[self._slots] = self._received
        return compact_buffers(self._plan, buffer, self._kv_heads)


class ReduceScatter:
    """Gradients of gathered rows on their way back to the ranks that own the rows: the mirror of ``Gather``.

    Args:
        gradient: ``(num_slots, B, 2D)``, float32 or float64: gradients of all compact buffers, keys then values.
    """

    def __init__(self, plan: ExchangePlan, group: dist.ProcessGroup, gradient: Tensor) -> None:
        self._rows, self._heads, slots = _on_device(plan, gradient.device)
        self._received, self._work = _all_to_all(gradient[slots], plan.receive_counts, plan.send_counts, group)

    def add_to(self, dk: Tensor, dv: Tensor) -> None:
        """Add what the ranks sent to ``dk``, ``dv`` ``(B, n, Hkv, D)``, in the order of ranks."""
        self._work.wait()
        received = self._received.transpose(0, 1)
        index = self._rows * dk.shape[2] + self._heads
        for total, part in zip((dk, dv), received.chunk(2, dim=-1), strict=True):
            flat = total.view(total.shape[0], -1, total.shape[-1])
            if flat.is_cuda:  # index_add_ adds in any order there; this sorts first
                flat.index_put_((torch.arange(len(flat), device=flat.device)[:, None], index), part, accumulate=True)
            else:
                flat.index_add_(1, index, part)


def new_gradient(plan: ExchangePlan, k: Tensor) -> Tensor:
    """Zeros ``(num_slots, B, 2D)`` in which the gradients of gathered rows are summed, float32 or wider."""
    return k.new_zeros(plan.num_slots, k.shape[0], 2 * k.shape[3], dtype=wide_dtype(k.dtype))


def compact_buffers(plan: ExchangePlan, slots: Tensor, kv_heads: int) -> tuple[list[Tensor], list[Tensor]]:
    """Views ``(B, M, Hkv, D)`` of ``slots`` ``(num_slots, B, 2D)``: keys and values of every shared segment."""
    buffers = []
    for segment, first in zip(plan.segments, plan.first_slots, strict=True):
        part = slots[first : first + segment.compact_rows * kv_heads]
        buffers.append(part.unflatten(0, (segment.compact_rows, kv_heads)).permute(2, 0, 1, 3).chunk(2, dim=-1))
    return [key for key, _ in buffers], [value for _, value in buffers]


def _all_to_all(
    sent: Tensor, send_counts: tuple[int, ...], receive_counts: tuple[int, ...], group: dist.ProcessGroup
) -> tuple[Tensor, dist.Work]:
    received = sent.new_empty(sum(receive_counts), *sent.shape[1:])
    work = dist.all_to_all_single(
        received, sent, list(receive_counts), list(send_counts), group=group, async_op=True
    )
    return received, work


@lru_cache(maxsize=64)
def _on_device(plan: ExchangePlan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, slots = (torch.from_numpy(x).to(device) for x in (plan.send_rows, plan.send_heads, plan.slots))
    return rows, heads, slots
