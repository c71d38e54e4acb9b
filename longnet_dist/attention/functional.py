"""Dilated attention on one device or across ranks: one function, one autograd Function, one path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longnet_dist.attention.agreement import agree_on_shards
from longnet_dist.comm.exchange import Gather, ReduceScatter, compact_buffers, new_gradient
from longnet_dist.geometry.exchange import ExchangePlan, plan_exchange
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import Shards, compact_piece, crosses_shards, dense_pieces
from longnet_dist.kernels.choice import choose_kernel
from longnet_dist.kernels.contract import Call, Kernel, wide_dtype


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
    total_rows: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Dilated attention (LongNet, section 2.2; across ranks, section 3), exact in output and gradients.

    .. math::
        \mathrm{LSE}(n,h) = \log \sum_i e^{\mathrm{LSE}_i(n,h)}, \qquad
        O(n,h) = \sum_i e^{\mathrm{LSE}_i - \mathrm{LSE}} O_i(n,h)

    over the branches :math:`i` of the pattern (equations 9 and 10): one softmax over all keys that a query sees.

    Args:
        q: queries ``(B, n, H, D)``; ``n`` rows of the sequence are on this rank.
        k: keys ``(B, n, Hkv, D)``, ``H`` a multiple of ``Hkv``; same dtype and device as ``q``.
        v: values ``(B, n, Hkv, D)``.
        pattern: the branches.
        causal: whether a row sees only itself and earlier rows.
        scale: factor of the scores, ``D ** -0.5`` if not given.
        group: the sequence-parallel group, its rank order the order of the slices; None for one device. All its ranks
            must call. All hold the same ``n``, the last may hold fewer. With ``total_rows`` the call makes one
            collective, or none where no segment crosses ranks; without, one more that compares all ranks' arguments.
        backend: ``"auto"``, ``"reference"`` or ``"sdpa"``.
        return_lse: also return the log-sum-exp of the scores.
        deterministic: gradients bitwise equal from run to run.
        total_rows: ``N``, rows of all ranks together, if the caller vouches for them.

    Returns:
        out ``(B, n, H, D)`` in the dtype of ``q``; with ``return_lse`` also lse ``(B, n, H)``, natural logarithm, float32
        (float64 for float64 inputs), without gradient. A (row, head) that no branch covers has output 0, lse ``-inf``
        and gradient 0.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit, on all ranks alike.
        ConfigError: an unknown backend, or one that cannot run here.
    """
    shards, rank = agree_on_shards(q, k, v, pattern, causal, group, total_rows)
    spec = _Spec(
        pattern,
        shards,
        rank,
        causal,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        choose_kernel(backend, q.device, q.dtype),
        group if crosses_shards(pattern, shards) else None,
        deterministic,
    )
    out, lse = _DilatedAttention.apply(q, k, v, spec)
    return (out, lse) if return_lse else out


@dataclass(frozen=True, slots=True)
class _Spec:
    """All that is not a tensor; ``group`` is None where no segment crosses ranks."""

    pattern: DilatedPattern
    shards: Shards
    rank: int
    causal: bool
    scale: float
    kernel: Kernel
    group: dist.ProcessGroup | None
    deterministic: bool

    def dense_calls(self, kv_heads: int) -> list[Call]:
        """The calls whose keys are this rank's own rows."""
        pieces = dense_pieces(self.pattern, *self.shards.window(self.rank), self.shards.total_rows, self.causal)
        return [self._call(piece, kv_heads) for piece in pieces]

    def shared_calls(self, plan: ExchangePlan, kv_heads: int) -> list[Call]:
        """The calls whose keys were gathered, one for each shared segment of the plan."""
        window = self.shards.window(self.rank)
        return [self._call(compact_piece(self.pattern, s, *window), kv_heads) for s in plan.segments]

    def plan(self, kv_heads: int) -> ExchangePlan:
        return plan_exchange(self.pattern, self.shards, self.rank, kv_heads, self.causal)

    def _call(self, piece: Any, kv_heads: int) -> Call:
        offsets = self.pattern.offsets(self.pattern.branches[piece.branch], kv_heads)
        return Call(piece, offsets, self.causal, self.scale, self.deterministic)


class _DilatedAttention(torch.autograd.Function):
    """Forward: start the gather, dense pieces, await it, shared pieces. Backward: shared pieces, start the
    reduce-scatter, dense pieces, await it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: _Spec) -> tuple[Tensor, Tensor]:
        kernel, kv_heads = spec.kernel, k.shape[2]
        gather = Gather(spec.plan(kv_heads), spec.group, k, v) if spec.group else None
        out = q.new_zeros(q.shape, dtype=kernel.accumulator_dtype(q.dtype))
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide_dtype(q.dtype))
        for call in spec.dense_calls(kv_heads):
            kernel.forward(call, q, k, v, out, lse)
        keys, values = gather.wait() if gather else ([], [])
        if gather:
            calls = spec.shared_calls(spec.plan(kv_heads), kv_heads)
            for call, key, value in zip(calls, keys, values, strict=True):
                kernel.forward(call, q, key, value, out, lse)
        out = out.to(q.dtype)
        ctx.spec = spec
        ctx.save_for_backward(q, k, v, out, lse, *keys, *values)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        spec: _Spec = ctx.spec
        q, k, v, out, lse, *gathered = ctx.saved_tensors
        kernel, kv_heads = spec.kernel, k.shape[2]
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        dq, dk, dv = (torch.zeros(x.shape, dtype=kernel.gradient_dtype(x.dtype), device=x.device) for x in (q, k, v))
        scatter = None
        if spec.group:
            plan = spec.plan(kv_heads)
            gradient = new_gradient(plan, k)
            calls, halves = spec.shared_calls(plan, kv_heads), len(gathered) // 2
            buffers = zip(gathered[:halves], gathered[halves:], *compact_buffers(plan, gradient, kv_heads), strict=True)
            for call, (key, value, dkey, dvalue) in zip(calls, buffers, strict=True):
                kernel.backward(call, dout, q, key, value, out, lse, delta, dq, dkey, dvalue)
            scatter = ReduceScatter(plan, spec.group, gradient)
        for call in spec.dense_calls(kv_heads):
            kernel.backward(call, dout, q, k, v, out, lse, delta, dq, dk, dv)
        if scatter:
            scatter.add_to(dk, dv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None
