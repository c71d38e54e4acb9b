"""The attention kernel that torch carries for CPUs, on strided views: no copy of the sequence, linear memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longnet_dist.kernels.contract import Call, WideSums
from longnet_dist.kernels.views import View, views

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_BLOCK_ELEMENTS = 1 << 22


class SdpaKernel(WideSums):
    """Each view is one call of torch's flash attention for CPUs; its backward takes the merged output and LSE."""

    name = "sdpa"

    def forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        for view in _blocks(call, q.shape[3]):
            for (q_, out_, lse_), (k_, v_), causal in _problems(view, (q, out, lse), (k, v)):
                part, part_lse = _forward(q_, k_, v_, is_causal=causal, scale=call.scale)
                merged = torch.logaddexp(lse_, part_lse)
                out_.mul_((lse_ - merged).exp_()[..., None]).add_(part * (part_lse - merged).exp_()[..., None])
                lse_.copy_(merged)

    def backward(
        self,
        call: Call,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        delta: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        for view in _blocks(call, q.shape[3]):
            for queries, keys, causal in _problems(view, (dout, q, out, lse, dq), (k, v, dk, dv)):
                (dout_, q_, out_, lse_, dq_), (k_, v_, dk_, dv_) = queries, keys
                parts = _backward(dout_, q_, k_, v_, out_, lse_, 0.0, causal, scale=call.scale)
                for total, part in zip((dq_, dk_, dv_), parts, strict=True):
                    total.add_(part)


def _blocks(call: Call, head_dim: int) -> Iterator[View]:
    """The views, cut where their segments are many, so that the memory of a kernel's results is used again and again.

    Fresh memory costs a page fault every 4 KiB: 15 % of the time of a long sequence.
    """
    for view in views(call):
        elements = view.queries * len(range(*view.heads.indices(len(call.offsets)))) * head_dim
        yield from view.split(max(1, _BLOCK_ELEMENTS // elements))


def _problems(
    view: View, query_buffers: tuple[Tensor, ...], key_buffers: tuple[Tensor, ...]
) -> Iterator[tuple[list[Tensor], list[Tensor], bool]]:
    """The view as problems of a kernel with a ``(batch, heads, rows, D)`` layout and a mask that starts at index 0.

    Queries that do not start at index 0 see all earlier keys, then a triangle: two problems. The query heads of a
    key/value head are problems of their own, and batch elements too, unless one stride reaches all their segments.
    """
    batch, heads_per_kv = query_buffers[0].shape[0], query_buffers[0].shape[2] // len(view.call.offsets)
    queries = [view.query_rows(x) for x in query_buffers]
    first = view.first_query
    if view.call.causal and view.queries == 1:  # a decoded row
        spans = [(0, min(first + 1, view.keys), False)]
    elif view.call.causal:
        spans = [(0, min(first, view.keys), False), (first, min(first + view.queries, view.keys), True)]
    else:
        spans = [(0, view.keys, False)]
    for start, stop, causal in spans:
        if start >= stop:
            continue
        keys = [view.key_rows(x, start, stop) for x in key_buffers]
        for element in range(batch):
            for member in range(heads_per_kv):
                yield (
                    [x[element, :, :, :, member].transpose(1, 2) for x in queries],
                    [x[element].transpose(1, 2) for x in keys],
                    causal,
                )
