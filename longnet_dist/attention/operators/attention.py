"""Dilated attention on one device as one operator, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet_dist.attention.functional import (
    AttentionSpec,
    attention_backward,
    attention_forward,
    gathered_rows,
    start_attention_backward,
)
from longnet_dist.attention.operators.arguments import GRID_SCHEMA, Edges, cu_seqlens_of, grid_of, pattern_of
from longnet_dist.attention.packing import Item, PackedBatch
from longnet_dist.attention.sink import delta_of, sink_gradient
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.numerics import wide_dtype

_GIVEN = (
    f"Tensor? sink, {GRID_SCHEMA}, bool causal, float? scale, str backend, bool deterministic, SymInt? total_rows, "
    "int first_head, int? total_heads"
)


def operator_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    causal: bool,
    scale: float | None,
    backend: str,
    deterministic: bool,
    total_rows: int | None,
    cu_seqlens: Any,
    sink: Tensor | None,
    first_head: int,
    total_heads: int | None,
) -> tuple[Tensor, Tensor]:
    """Return out and lse of :func:`~longnet_dist.dilated_attention` on one device, as one operator."""
    out, lse = torch.ops.longnet_dist.attention(
        q, k, v, sink, *Edges.of(cu_seqlens), *grid_of(pattern), causal, scale, backend, deterministic, total_rows,
        first_head, total_heads,
    )  # fmt: skip
    return out, lse


class _Given(NamedTuple):
    """The arguments behind q, k and v of the operators, as ``_GIVEN`` lists them."""

    sink: Tensor | None
    edges: Tensor | None
    integers: Sequence[int]
    counts: Sequence[int]
    lengths: Sequence[int]
    rates: Sequence[int]
    rule: str
    shift: Sequence[int]
    turn: int
    causal: bool
    scale: float | None
    backend: str
    deterministic: bool
    total_rows: int | None
    first_head: int
    total_heads: int | None

    def calls(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[PackedBatch, list[tuple[AttentionSpec, Item]]]:
        """Check the call, and split it as :class:`PackedBatch` does."""
        pattern = pattern_of(tuple(self.lengths), tuple(self.rates), self.rule, tuple(self.shift), self.turn)
        packed = PackedBatch.read(cu_seqlens_of(self.edges, self.integers, self.counts), q, k, None, None)
        heads = self.first_head, self.total_heads
        found = []
        for item in packed.items(q, k, v, self.sink):
            spec = AttentionSpec.of(
                *item.qkv, pattern, self.causal, self.scale, None, self.backend, self.deterministic, True,
                self.total_rows, None, item.sink, item.documents, packed, heads,
            )  # fmt: skip
            found.append((spec, item))
        return packed, found


@torch.library.custom_op(
    "longnet_dist::attention", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {_GIVEN}) -> (Tensor, Tensor)"
)
def _attention(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    packed, calls = _Given(*given).calls(q, k, v)
    parts = [attention_forward(*item.qkv, spec, item.sink)[:2] for spec, item in calls]
    out, lse = packed.joined(parts, q)
    return out.contiguous(), lse.contiguous()


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide_dtype(q.dtype))


@torch.library.custom_op(
    "longnet_dist::attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, {_GIVEN}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *given: Any
) -> tuple[Tensor, ...]:
    # Kernels compute delta themselves, unless lse has a gradient that it must contain.
    sink = _Given(*given).sink
    delta = delta_of(dout, out, lse, dlse) if dlse is not None or sink is not None else None
    dsink = q.new_empty(0) if sink is None or delta is None else sink_gradient(sink, lse, delta)
    packed, calls = _Given(*given).calls(q, k, v)
    parts = []
    for number, (spec, item) in enumerate(calls):
        of_call = partial(_part, packed, number)
        start = start_attention_backward(
            of_call(dout), of_call(out), of_call(lse), spec,
            None if delta is None else of_call(delta), dlse=None if dlse is None else of_call(dlse),
        )  # fmt: skip
        _, k_, v_ = item.qkv
        parts.append(attention_backward(start, *item.qkv, gathered_rows(spec, k_, v_), spec))
    sums = (torch.cat(x) if len(x) > 1 else x[0] for x in zip(*parts, strict=True))
    dq, dk, dv = (dx.reshape(x.shape).to(x.dtype).contiguous() for dx, x in zip(sums, (q, k, v), strict=True))
    return dq, dk, dv, dsink


@_attention_backward.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *given: Any
) -> tuple[Tensor, ...]:
    sink = _Given(*given).sink
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(0) if sink is None else sink.new_empty(sink.shape)


def _part(packed: PackedBatch, number: int, x: Tensor) -> Tensor:
    """Return what call ``number`` of a batch has of a tensor ``(B, rows, …)``."""
    if packed.rows:
        return x.flatten(0, 1)[None]
    return x if len(packed.lists) <= 1 else x[number : number + 1]


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sink, edges, *ctx.given = inputs
    ctx.save_for_backward(q, k, v, sink, edges, *output)
    ctx.set_materialize_grads(False)  # no zeros for a gradient of lse that nobody computed


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, sink, edges, out, lse = ctx.saved_tensors
    nothing = (None,) * (1 + len(ctx.given))
    if dout is None and dlse is None:
        return (None,) * 4 + nothing
    dout = torch.zeros_like(out) if dout is None else dout
    *gradients, dsink = torch.ops.longnet_dist.attention_backward(
        dout, dlse, out, lse, q, k, v, sink, edges, *ctx.given
    )
    return (*gradients, None if sink is None else dsink, *nothing)


_attention.register_autograd(_backward, setup_context=_set_up)
