"""Dilated attention on one device or across ranks: one function, one autograd Function, one path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_dist.attention.kernels.contract import BackwardInputs, Call, Gradients, Kernel, SoftmaxStatistics
from longnet_dist.attention.kernels.registry import choose_kernel
from longnet_dist.attention.packing import ONE_DOCUMENT, PackedBatch
from longnet_dist.attention.sink import delta_of, join_sink, sink_gradient
from longnet_dist.attention.stream import LayerCache
from longnet_dist.attention.validation import agree_on_shards, check_scale, check_types, positive_scale
from longnet_dist.caches import bounded_cache
from longnet_dist.comm.transfer import CompactBuffers, Gather, ReduceScatter
from longnet_dist.errors import ConfigError
from longnet_dist.geometry.documents import Documents
from longnet_dist.geometry.exchange_plan import ExchangePlan, plan_exchange, plan_within
from longnet_dist.geometry.overlap import first_halves, overlaps
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import (
    Piece,
    Segment,
    Shards,
    compact_piece,
    dense_pieces,
    needs_exchange,
    shared_segments,
)
from longnet_dist.numerics import differentiable_once, wide_dtype

LEAST_SCALE = 2.0**-10
"""Smallest factor of the scores, and 1 over the largest, with which float16 can hold a multiplicity's logarithm."""


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    *,
    causal: bool = True,
    scale: float | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    deterministic: bool = False,
    overlap: bool = True,
    total_rows: int | None = None,
    cache: LayerCache | None = None,
    cu_seqlens: Any = None,
    sink: Tensor | None = None,
    first_head: int = 0,
    total_heads: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Compute dilated attention (LongNet, section 2.2; across ranks, section 3), exact in output and gradients.

    .. math::
        \mathrm{LSE}(n,h) = \log \sum_i e^{\mathrm{LSE}_i(n,h)}, \qquad
        O(n,h) = \sum_i e^{\mathrm{LSE}_i - \mathrm{LSE}} O_i(n,h)

    over the branches :math:`i` of the pattern (equations 9 and 10): one softmax over all keys that a query sees.

    Args:
        q: queries ``(B, n, H, D)``; ``n`` rows of the sequence are on this rank. On one device there may be fewer than
            keys: then they are those of the last rows, ``(B, m, H, D)``, as output and log-sum-exp.
        k: keys ``(B, n, Hkv, D)``, ``H`` a multiple of ``Hkv``; same dtype and device as ``q``.
        v: values ``(B, n, Hkv, D)``.
        pattern: the branches.
        causal: whether a row sees only itself and earlier rows.
        scale: factor of the scores, ``D ** -0.5`` if not given.
        group: the sequence-parallel group, its rank order the order of the slices; None for one device. All its ranks
            must call. All hold the same ``n``, the last may hold fewer. A call makes one small collective that compares
            the ranks' arguments, and one that carries rows where segments cross ranks.
        backend: ``"auto"``, ``"reference"``, ``"sdpa"`` (CPU), ``"triton"`` or ``"flash"`` (GPU).
        return_lse: also return the log-sum-exp of the scores.
        deterministic: gradients bitwise equal from run to run.
        overlap: compute the segments inside the slice while rows travel; else wait for them first. Same result.
        total_rows: ``N``, rows of all ranks together, if the caller wants them checked.
        cache: the layer's cache in a stream, which has all documents: the rows are this rank's slice of its chunk.
        cu_seqlens: edges of packed documents, host integers in rows of the whole sequence over all ranks: ``[0, a, …,
            N]``, or one such list for each item; the same on all ranks. Each document computes what it computes alone.
            A list from above 0 to below ``N`` leaves padding: finite numbers with output 0, lse ``-inf``, gradient 0.
        sink: ``(H,)``, ``(n, H)`` or ``(B, n, H)``, the logarithm of the weight of one more key, whose value is 0
            (:mod:`longnet_dist.attention.sink`); differentiable. Over ranks, rows are this rank's, and the gradient of
            ``(H,)`` is this rank's part: their sum is the whole.
        first_head, total_heads: the call holds the key/value heads from ``first_head`` on, of ``total_heads`` (None: up
            to its last), as with Ulysses or tensor parallelism; they keep the offsets of the whole model.

    Returns:
        out ``(B, n, H, D)`` in the dtype of ``q``; with ``return_lse`` also lse ``(B, n, H)``, natural logarithm,
        float32 (float64 for float64 inputs), differentiable; a sink is part of it. A (row, head) that no branch covers
        has output 0, lse ``-inf`` (or the sink) and gradient 0.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit, on all ranks alike.
        ConfigError: a scale that is no finite number, a backend that cannot run here; other ranks raise a ShapeError.
    """
    q, scale = positive_scale(q, scale)
    if torch.compiler.is_compiling():
        return _compiled(
            q, k, v, pattern, causal, scale, group, backend, return_lse, deterministic, overlap, total_rows, cache,
            cu_seqlens, sink, first_head, total_heads,
        )  # fmt: skip
    check_types(q, k, v, pattern, causal, group, cache, sink, forms=group is None and cu_seqlens is not None)
    packed = PackedBatch.read(cu_seqlens, q, k, group, cache)
    parts = []
    for item in packed.items(q, k, v, sink):
        spec = AttentionSpec.of(
            *item.qkv, pattern, causal, scale, group, backend, deterministic, overlap, total_rows, cache, item.sink,
            item.documents, packed, (first_head, total_heads),
        )  # fmt: skip
        parts.append(attend(*item.qkv, spec, item.sink))
    out, lse = packed.joined(parts, q)
    return (out, lse) if return_lse else out


def _compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    causal: bool,
    scale: float | None,
    group: dist.ProcessGroup | None,
    backend: str,
    return_lse: bool,
    deterministic: bool,
    overlap: bool,
    total_rows: int | None,
    cache: LayerCache | None,
    cu_seqlens: Any,
    sink: Tensor | None,
    first_head: int,
    total_heads: int | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute :func:`dilated_attention` in a graph: one operator, or, over ranks and in streams, outside the graph."""
    if group is not None or cache is not None:
        eager = torch.compiler.disable(dilated_attention)  # type: ignore[no-untyped-call]
        result: Tensor | tuple[Tensor, Tensor] = eager(
            q, k, v, pattern, causal=causal, scale=scale, group=group, backend=backend, return_lse=return_lse,
            deterministic=deterministic, overlap=overlap, total_rows=total_rows, cache=cache, cu_seqlens=cu_seqlens,
            sink=sink, first_head=first_head, total_heads=total_heads,
        )  # fmt: skip
        return result
    from longnet_dist.attention.operators.attention import operator_attention  # it builds on this module

    out, lse = operator_attention(
        q, k, v, pattern, causal, scale, backend, deterministic, total_rows, cu_seqlens, sink, first_head, total_heads
    )
    return (out, lse) if return_lse else out


def attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return out and lse of :func:`dilated_attention` for a call that was checked; autograd records it."""
    out, lse = _DilatedAttention.apply(q, k, v, sink, spec)  # type: ignore[no-untyped-call]
    return out, lse


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Hold all of a call that is not a tensor; :meth:`of` makes and checks it.

    Attributes:
        merges: whether pairs that several branches hold are computed once.
    """

    pattern: DilatedPattern
    shards: Shards
    rank: int
    causal: bool
    scale: float
    kernel: Kernel
    merges: bool
    group: dist.ProcessGroup | None
    deterministic: bool
    overlap: bool
    cache: LayerCache | None
    documents: Documents | None = None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: DilatedPattern,
        causal: bool,
        scale: float | None,
        group: dist.ProcessGroup | None,
        backend: str,
        deterministic: bool,
        overlap: bool,
        total_rows: int | None,
        cache: LayerCache | None,
        sink: Tensor | None = None,
        documents: Documents | None = None,
        packed: PackedBatch = ONE_DOCUMENT,
        heads: tuple[int, int | None] = (0, None),
    ) -> AttentionSpec:
        """Build and check the spec of a call; the arguments and errors are those of :func:`dilated_attention`.

        Only the shapes, dtypes and devices of q, k and v are used. ``heads`` are ``first_head, total_heads``.
        """
        kernel, refusal = None, None
        try:
            check_scale(scale)
            kernel = choose_kernel(backend, q.device, q.dtype, deterministic)
            if k.dim() == 4:  # else refused below
                pattern = pattern.of_heads(*heads, k.shape[2])
        except ConfigError as error:
            refusal = error
        merges = kernel is not None and kernel.merges_overlaps
        if merges and scale is not None:
            merges = LEAST_SCALE <= scale <= 1 / LEAST_SCALE
        shards, rank = agree_on_shards(
            q, k, v, pattern, causal, group, total_rows, cache, merges, refusal, sink, packed
        )
        assert kernel is not None, "a rank without a kernel has raised why"
        return cls(
            pattern,
            shards,
            rank,
            causal,
            q.shape[-1] ** -0.5 if scale is None else float(scale),
            kernel,
            merges,
            group if shards.num_ranks > 1 else None,
            deterministic,
            overlap,
            cache,
            documents if cache is None else cache.stream.documents,
        )

    @property
    def window(self) -> tuple[int, int]:
        """Return the first row of this rank's queries and the row behind the last."""
        return self.shards.window(self.rank)

    @property
    def exchanges(self) -> bool:
        """Say whether a query sees keys of another rank or chunk."""
        return needs_exchange(self.pattern, self.shards, self.documents)

    @property
    def halves(self) -> tuple[int, ...]:
        """Return :func:`first_halves` where they limit what ranks exchange; else an empty tuple, for all rows.

        Chunks leave all rows for the next chunk, which another kernel may compute.
        """
        whole = self.shards.stop - self.shards.start == self.shards.total_rows
        return first_halves(self.pattern) if self.merges and self.causal and whole else ()

    @property
    def earlier_rows(self) -> int:
        """Return the rows of k before the first query's, where this device has all keys and the last rows' queries."""
        return self.shards.start if self.cache is None else 0

    def plan(self, kv_heads: int) -> ExchangePlan:
        """Return which sparse rows this rank sends and receives."""
        if self.earlier_rows:
            return plan_within(self.pattern, self.shards, kv_heads, self.causal, self.documents)
        return plan_exchange(self.pattern, self.shards, self.rank, kv_heads, self.causal, self.halves, self.documents)

    def shared(self) -> tuple[Segment, ...]:
        """Return the segments whose keys this window takes from compact buffers."""
        return shared_segments(
            self.pattern, *self.window, self.shards.total_rows, self.causal, self.halves, self.documents
        )

    def dense_calls(self, kv_heads: int) -> tuple[Call, ...]:
        """Return the calls whose keys are the window's own rows.

        A call that covers every row and head (r = 1) comes first. It is fresh if the kernel can write buffers that were
        never written; later calls add to them.
        """
        total, fresh = self.shards.total_rows, self.kernel.starts_fresh
        return _dense_calls(self._maker(kv_heads), self.pattern, self.window, total, fresh, self.documents)

    def shared_calls(self, kv_heads: int) -> tuple[tuple[Call, ...], ...]:
        """Return the calls of each segment of :meth:`shared`."""
        return _shared_calls(self._maker(kv_heads), self.pattern, self.window, self.shared(), self.documents)

    def _maker(self, kv_heads: int) -> _CallMaker:
        return _CallMaker(kv_heads, self.causal, self.scale, self.deterministic, self.merges)


class _CallMaker(NamedTuple):
    """Make the calls of pieces, from what all of them have in common."""

    kv_heads: int
    causal: bool
    scale: float
    deterministic: bool
    merges_overlaps: bool

    def calls(self, piece: Piece, pattern: DilatedPattern) -> tuple[Call, ...]:
        pieces = overlaps(pattern)[piece.branch].split(piece, self.causal) if self.merges_overlaps else (piece,)
        branch = pattern.branches[piece.branch]
        offsets, block = pattern.offsets(branch, self.kv_heads), pattern.head_block(branch, self.kv_heads)
        common = offsets, self.causal, self.scale, self.deterministic
        before = pattern.heads_before(branch, self.kv_heads)
        return tuple(Call(x, *common, head_block=block, heads_before=before) for x in pieces)


@bounded_cache(maxsize=256)
def _dense_calls(
    maker: _CallMaker,
    pattern: DilatedPattern,
    window: tuple[int, int],
    total_rows: int,
    starts_fresh: bool,
    documents: Documents | None,
) -> tuple[Call, ...]:
    no_padding = documents is None or documents.covers(*window)

    def covers_all(piece: Piece) -> bool:
        whole = no_padding and not piece.half and (piece.query_start, piece.query_stop) == window
        return whole and piece.dilation_rate == 1

    pieces = dense_pieces(pattern, *window, total_rows, maker.causal, documents)
    calls = sorted((y for x in pieces for y in maker.calls(x, pattern)), key=lambda call: not covers_all(call.piece))
    if starts_fresh and calls and covers_all(calls[0].piece):
        calls[0] = replace(calls[0], fresh=True)
    return tuple(calls)


@bounded_cache(maxsize=256)
def _shared_calls(
    maker: _CallMaker,
    pattern: DilatedPattern,
    window: tuple[int, int],
    segments: tuple[Segment, ...],
    documents: Documents | None,
) -> tuple[tuple[Call, ...], ...]:
    return tuple(maker.calls(compact_piece(pattern, segment, *window, documents), pattern) for segment in segments)


def _per_head(q: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an empty ``(B, n, H)`` in which the rows of a head are adjacent, as kernels read them."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=dtype).transpose(1, 2)


def _own_rows(spec: AttentionSpec, *tensors: Tensor) -> tuple[Tensor, ...]:
    """View the rows of key buffers that have queries here."""
    return tuple(x[:, spec.earlier_rows :] for x in tensors) if spec.earlier_rows else tensors


def _plain(*tensors: Tensor) -> Iterator[Tensor]:
    """Copy the ``(B, n, H, D)`` tensors that kernels cannot read in place; return the others as they are.

    Kernels read a head's channels as one block, and the copy engine needs rows that lie apart. A gradient that was
    expanded, as ``out.sum()`` or a mean over rows gives it, has neither.
    """
    return (x if x.stride(-1) == 1 and (x.stride(1) or x.shape[1] == 1) else x.contiguous() for x in tensors)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, sink: Tensor | None = None, backward: bool = False
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute the local pieces while the sparse rows of other ranks travel, then the pieces that need them.

    With ``backward`` the kernels of the backward are compiled with those of the forward.

    Returns:
        out ``(B, n, H, D)``, lse ``(B, n, H)`` and, for backward, keys and values of the shared segments.
    """
    q, k, v = _plain(q, k, v)
    kernel, kv_heads, exchanges = spec.kernel, k.shape[2], spec.exchanges
    gather = None
    if exchanges and not (spec.cache and spec.cache.complete):
        # The paper's exchange (section 3.1): sparse rows of K and V alone, as many for any N.
        gather = Gather(spec.plan(kv_heads), spec.group, k, v, spec.overlap)
    calls, own_k, own_v = spec.dense_calls(kv_heads), *_own_rows(spec, k, v)
    out = torch.empty(q.shape, dtype=kernel.accumulator_dtype(q.dtype), device=q.device)
    lse = _per_head(q, wide_dtype(q.dtype))
    if not (calls and calls[0].fresh):
        # A softmax over no keys: O = 0, LSE = ln 0.
        out.zero_()
        lse.fill_(-torch.inf)
    kernel.compile(calls, q, own_k, own_v, backward)
    # Each call merges its keys into the running (O, LSE): LSE'' = ln(e^LSE + e^LSE'), equations 9 and 10.
    for call in calls:
        kernel.forward(call, q, own_k, own_v, out, lse)
    shared: list[Tensor] = []
    if exchanges:
        segments = spec.plan(kv_heads).segments
        rows = spec.cache.rows(segments, k) if spec.cache else CompactBuffers(segments, kv_heads, k, k.dtype)
        if gather:
            gather.wait(rows)
        for calls, (key, value) in zip(spec.shared_calls(kv_heads), rows.views(spec.shared()), strict=True):
            for call in calls:
                kernel.forward(call, q, key, value, out, lse)
            shared += [key, value]
    if sink is not None:
        join_sink(out, lse, sink, spec.documents.padding(*spec.window) if spec.documents else ())
    out = out.to(q.dtype)
    return out, lse, shared


def gathered_rows(spec: AttentionSpec, k: Tensor, v: Tensor) -> list[Tensor]:
    """Return keys and values of the shared segments once more, where this device has all keys of the sequence."""
    if not spec.exchanges:
        return []
    k, v = _plain(k, v)
    plan = spec.plan(k.shape[2])
    rows = CompactBuffers(plan.segments, k.shape[2], k, k.dtype)
    Gather(plan, None, k, v, overlap=False).wait(rows)
    return [x for pair in rows.views(spec.shared()) for x in pair]


class BackwardStart(NamedTuple):
    """Carry what a backward needs of the output, so that the caller can free the output before it has q, k, v.

    Attributes:
        dout: gradient of the output.
        statistics: LSE and delta, or the output, in the kernel's form.
        dq: zeros in the dtype in which dQ is summed.
        copy: scratch in the inputs' dtype, to which dq is rounded at the end if the caller wants that; None otherwise.
            Until then it may hold the statistics.
    """

    dout: Tensor
    statistics: SoftmaxStatistics
    dq: Tensor
    copy: Tensor | None


def start_attention_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    delta: Tensor | None = None,
    narrow: bool = True,
    dlse: Tensor | None = None,
) -> BackwardStart:
    """Start a backward, after which the caller may free the output.

    Args:
        dout, out, lse: gradient of the output, output and log-sum-exp, merged over all branches and the sink.
        spec: of the call.
        delta: ``rowsum(dout ∘ out) - dlse (B, n, H)``, if it is known; it must be where there is a ``dlse``.
        narrow: whether dq gets the dtype of q. Left as wide as it was summed, it needs no second buffer.
        dlse: gradient of the log-sum-exp, if it has one.
    """
    (dout,) = _plain(dout)
    query_dtype, _ = spec.kernel.gradient_dtypes(out.dtype)
    dq = torch.empty(out.shape, dtype=query_dtype, device=out.device)
    copy = torch.empty_like(dq, dtype=out.dtype) if narrow and query_dtype != out.dtype else None
    return BackwardStart(dout, spec.kernel.start_backward(dout, out, lse, dq, copy, delta, dlse), dq, copy)


def attention_backward(
    start: BackwardStart, q: Tensor, k: Tensor, v: Tensor, shared: list[Tensor], spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the pieces with rows of other ranks, then the local pieces while those gradients travel back.

    With the merged LSE and delta each piece adds its own part: dQ = Σ scale·dS K, dK = Σ scale·dSᵀ Q, dV = Σ Pᵀ dO over
    the pieces.

    Returns:
        dq, and dk and dv in the dtype in which they were summed.
    """
    q, k, v = _plain(q, k, v)
    kernel, kv_heads, exchanges = spec.kernel, k.shape[2], spec.exchanges
    calls = spec.dense_calls(kv_heads)
    dout, statistics, dq, copy = start
    _, key_dtype = kernel.gradient_dtypes(q.dtype)
    dk, dv = (torch.empty(x.shape, dtype=key_dtype, device=x.device) for x in (k, v))
    own_k, own_v, own_dk, own_dv = _own_rows(spec, k, v, dk, dv)
    given = BackwardInputs(dout, q, own_k, own_v, statistics)
    cleared = [dk, dv]
    if calls and calls[0].fresh:  # which writes the rows that have queries
        cleared = [x[:, : spec.earlier_rows] for x in cleared] if spec.earlier_rows else []
    for gradient in cleared:
        gradient.zero_()
    scatter = None
    if exchanges:
        plan = spec.plan(kv_heads)
        gradients = (
            spec.cache.gradients(plan.segments, k)
            if spec.cache
            else CompactBuffers(plan.segments, kv_heads, k, wide_dtype(k.dtype))
        )
        buffers = zip(shared[::2], shared[1::2], gradients.views(spec.shared()), strict=True)
        for parts, (key, value, (dkey, dvalue)) in zip(spec.shared_calls(kv_heads), buffers, strict=True):
            for call in parts:
                kernel.backward(call, given._replace(k=key, v=value), Gradients(dq, dkey, dvalue))
        # A key's gradient is the sum over all queries that saw it, so the ranks' parts are summed at its owner.
        scatter = ReduceScatter(plan, spec.group, gradients, spec.overlap)
    for call in calls:
        kernel.backward(call, given, Gradients(dq, own_dk, own_dv))
    if scatter:
        scatter.add_to(dk, dv)
    return dq if copy is None else copy.copy_(dq), dk, dv


class _DilatedAttention(torch.autograd.Function):
    """Compute dilated attention; save q, k, v, out, lse, and the gathered keys and values of shared segments.

    The latter are ``2·D·Hkv·Σ w/r`` numbers, whatever ``N`` is. So they are kept and not gathered again: see
    docs/internals.md, "The exchange".
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        out, lse, shared = attention_forward(q, k, v, spec, sink, any(ctx.needs_input_grad))
        ctx.spec = spec
        ctx.save_for_backward(q, k, v, sink, out, lse, *shared)
        ctx.set_materialize_grads(False)  # no zeros for a gradient of lse that nobody computed
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return None, None, None, None, None
        q, k, v, sink, out, lse, *shared = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        # Kernels compute delta themselves, unless lse has a gradient that it must contain.
        delta = delta_of(dout, out, lse, dlse) if dlse is not None or sink is not None else None
        dsink = None if sink is None or delta is None else sink_gradient(sink, lse, delta)
        start = start_attention_backward(dout, out, lse, ctx.spec, delta, dlse=dlse)
        dq, dk, dv = attention_backward(start, q, k, v, shared, ctx.spec)
        return dq, dk.to(k.dtype), dv.to(v.dtype), dsink, None
