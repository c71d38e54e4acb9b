"""Dilated attention over a batch whose documents are in tensors; compiled, it is one operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from longnet_dist.attention.functional import (
    AttentionSpec,
    attention_backward,
    attention_forward,
    dilated_attention,
    start_attention_backward,
)
from longnet_dist.attention.operators.arguments import grid_of, pattern_of
from longnet_dist.attention.packing import Item, PackedBatch
from longnet_dist.attention.sink import delta_of, sink_gradient
from longnet_dist.errors import ShapeError
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.numerics import wide_dtype

Edges = list[int] | list[list[int]] | None
_GIVEN = (
    "Tensor? sink, Tensor? mask, Tensor? position_ids, Tensor? cu_seqlens, "
    "int[] lengths, int[] rates, str rule, int[] shift, int turn, bool causal, float? scale"
)
_KEPT = "_longnet_dist_edges"
"""Attribute of a mask or of position ids: their edges, so that the layers of a model read them once."""


def attend_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    *,
    causal: bool,
    scale: float | None,
    sink: Tensor | None,
    mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Return ``(B, n, H, D)`` for ``q (B, n, H, D)`` and ``k, v (B, m, Hkv, D)``; see ``dilated_forward``."""
    if torch.compiler.is_compiling():
        tensors = q, k, v, sink, mask, position_ids, cu_seqlens
        out, _ = torch.ops.longnet_dist.hf_attention(*tensors, *grid_of(pattern), causal, scale)
        return cast(Tensor, out)
    edges = edges_of(mask, position_ids, cu_seqlens, q.shape[1], k.shape[1])
    deterministic = torch.are_deterministic_algorithms_enabled()
    return cast(
        Tensor,
        dilated_attention(
            q, k, v, pattern, causal=causal, scale=scale, cu_seqlens=edges, sink=sink, deterministic=deterministic
        ),
    )


def edges_of(
    mask: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor | None, queries: int, keys: int
) -> Edges:
    """Return the edges of documents: from ``cu_seqlens``, else from the mask, else from positions; None: one each.

    Raises:
        ShapeError: a mask with gaps, or without a token.
    """
    if cu_seqlens is not None:
        edges = cast(list[int], _kept(cu_seqlens, 0, lambda x: x.tolist()))
        return None if edges == [0, keys] else edges
    if mask is not None:
        return cast(Edges, _kept(mask, keys, lambda x: _edges_of_mask(x[:, -keys:])))
    if position_ids is not None and queries == keys == position_ids.shape[1]:
        return cast(Edges, _kept(position_ids, keys, _edges_of_positions))
    return None


def _kept(tensor: Tensor, keys: int, read: Callable[[Tensor], Any]) -> Any:
    """Return ``read(tensor)``, which a tensor keeps as long as nobody writes into it."""
    known = keys, 0 if tensor.is_inference() else tensor._version
    kept = getattr(tensor, _KEPT, None)
    if kept is None or kept[0] != known:
        kept = known, read(tensor)
        setattr(tensor, _KEPT, kept)
    return kept[1]


def _edges_of_mask(mask: Tensor) -> Edges:
    rows = (mask != 0).int()
    number = rows.sum(1)
    first = rows.argmax(1)
    last = mask.shape[1] - 1 - rows.flip(1).argmax(1)
    counts, firsts, lasts = torch.stack([number, first, last]).tolist()
    for item, (count, start, stop) in enumerate(zip(counts, firsts, lasts, strict=True)):
        if count == 0 or count != stop - start + 1:
            what = "has no token" if count == 0 else f"has {count} tokens between {start} and {stop}"
            raise ShapeError(
                f"the mask of a sequence is one run of tokens with padding around it, but item {item} {what}; "
                "generate masks the tokens that are pad_token_id, so pass attention_mask where texts hold that id"
            )
    if all(count == mask.shape[1] for count in counts):
        return None
    return [[start, stop + 1] for start, stop in zip(firsts, lasts, strict=True)]


def _edges_of_positions(position_ids: Tensor) -> Edges:
    breaks = (position_ids.diff(dim=1) != 1).tolist()
    lists = [[0, *(place + 1 for place, begins in enumerate(row) if begins), len(row) + 1] for row in breaks]
    if all(len(edges) == 2 for edges in lists):
        return None
    return lists[0] if len(lists) == 1 else lists


class _Given(NamedTuple):
    """The arguments behind q, k and v of the operators, as ``_GIVEN`` lists them."""

    sink: Tensor | None
    mask: Tensor | None
    position_ids: Tensor | None
    cu_seqlens: Tensor | None
    lengths: Sequence[int]
    rates: Sequence[int]
    rule: str
    shift: Sequence[int]
    turn: int
    causal: bool
    scale: float | None

    def call(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[PackedBatch, Item, AttentionSpec]:
        """Return the one call that a batch is on one device."""
        edges = edges_of(self.mask, self.position_ids, self.cu_seqlens, q.shape[1], k.shape[1])
        pattern = pattern_of(tuple(self.lengths), tuple(self.rates), self.rule, tuple(self.shift), self.turn)
        packed = PackedBatch.read(edges, q, k, None, None)
        (item,) = packed.items(q, k, v, self.sink)
        deterministic = torch.are_deterministic_algorithms_enabled()
        spec = AttentionSpec.of(
            *item.qkv, pattern, self.causal, self.scale, None, "auto", deterministic, True, None, None, item.sink,
            item.documents, packed,
        )  # fmt: skip
        return packed, item, spec


@torch.library.custom_op(
    "longnet_dist::hf_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_GIVEN}) -> (Tensor, Tensor)",
)
def _attention(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    packed, item, spec = _Given(*given).call(q, k, v)
    out, lse, _ = attention_forward(*item.qkv, spec, item.sink)
    out, lse = packed.joined([(out, lse)], q)
    return out.contiguous(), lse.contiguous()


@_attention.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:3], dtype=wide_dtype(q.dtype))


@torch.library.custom_op(
    "longnet_dist::hf_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, {_GIVEN}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *given: Any
) -> tuple[Tensor, ...]:
    _, item, spec = _Given(*given).call(q, k, v)
    shape = item.qkv[0].shape
    dout, out, lse = dout.reshape(shape), out.view(shape), lse.view(shape[:3])
    delta = None if item.sink is None else delta_of(dout, out, lse, None)
    dsink = q.new_empty(0) if item.sink is None or delta is None else sink_gradient(item.sink, lse, delta)
    start = start_attention_backward(dout, out, lse, spec, delta, dlse=None)
    dq, dk, dv = attention_backward(start, *item.qkv, [], spec)
    gradients = [d.to(x.dtype).reshape(x.shape).contiguous() for d, x in ((dq, q), (dk, k), (dv, v))]
    return gradients[0], gradients[1], gradients[2], dsink


@_attention_backward.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    return *gradients, q.new_empty(0) if sink is None else torch.empty_like(sink)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:7])
    ctx.settings = inputs[7:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    saved, settings = ctx.saved_tensors, ctx.settings
    dq, dk, dv, dsink = torch.ops.longnet_dist.hf_attention_backward(dout, *saved, *settings)
    return dq, dk, dv, None if saved[5] is None else dsink, *[None] * (len(settings) + 3)


_attention.register_autograd(_backward, setup_context=_setup)
