"""A block's forward and backward, and what it saves between them.

Two autograd Functions make a block: the attention with all that comes before it, and what comes behind it. Between
forward and backward a block saves its input (``full``), or its input and the attention's result (``selective``), and
with ``cache_qkv`` the queries, keys and values. Backward recomputes the rest: row-wise parts tile by tile, each just
before its own gradient. So only ``x, q, k, v``, the attention's output and their gradients ever exist whole. ``none``
leaves all to autograd.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from longnet_dist.attention.functional import (
    AttentionSpec,
    attend,
    attention_backward,
    attention_forward,
    start_attention_backward,
)
from longnet_dist.attention.sink import delta_of, sink_gradient
from longnet_dist.engine.rows import RowParts
from longnet_dist.engine.saved_tensors import SavedTensors
from longnet_dist.numerics import differentiable_once
from longnet_dist.ops.matmul.choice import Normed

if TYPE_CHECKING:
    from longnet_dist.engine.execution import Execution


@dataclass
class BlockRun:
    """Run the tokens of a batch through one block, once.

    Attributes:
        parts: the row-wise parts of the block.
        spec: its attention.
        execution: its options, which say what it saves.
        shape: ``(B, n)``, the sequences and their tokens on this rank.
        saved: the tensors saved for backward; None if there will be none.
        sink: the learned sinks ``(H,)``; None for none.
    """

    parts: RowParts
    spec: AttentionSpec
    execution: Execution
    shape: tuple[int, int]
    saved: SavedTensors | None
    sink: Tensor | None = None
    _shared: list[Tensor] = field(default_factory=list, init=False)
    _moments: list[Normed] = field(default_factory=list, init=False)
    _for_attention: _ForAttention | None = field(default=None, init=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output ``(B·n, E)`` for its input ``(B·n, E)``."""
        if self.execution.checkpointing == "none":
            q, k, v = (torch.unflatten(part, 0, self.shape) for part in self.parts.graph_before(x))
            out, _ = attend(q, k, v, self.spec, self.sink)
            return self.parts.graph_after(x, out.flatten(0, 1))
        out = _Attention.apply(x, self, self.sink, *self.parts.before.values())  # type: ignore[no-untyped-call]
        z: Tensor = _Output.apply(x, out, self, *self.parts.after.values())  # type: ignore[no-untyped-call]
        return z

    def attention(self, x: Tensor) -> Tensor:
        """Return the attention's output ``(B·n, H, D)``, without graph."""
        qkv = q, k, v = self._qkv(x)
        out, lse, shared = attention_forward(q, k, v, self.spec, self.sink, backward=self.saved is not None)
        if self.saved is not None:
            self.saved.put("x", x)
            if self.execution.checkpointing != "full":
                self.saved.put("out", out)
                self.saved.put("lse", lse.transpose(1, 2).contiguous())
                self._shared = shared
            if self.execution.saves_qkv:
                for name, tensor in zip("qkv", qkv, strict=True):
                    self.saved.put(name, tensor, stays=not self.execution.offload_qkv)
        return out.flatten(0, 1)

    def output(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the block's output ``(B·n, E)``, without graph."""
        z, moments = self.parts.output(x, out)
        if self.execution.checkpointing != "full":
            self._moments = moments
        return z

    def output_backward(self, dz: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients of the attention's output and of the weights behind it."""
        assert self.saved is not None
        self.saved.fetch()
        if self.execution.checkpointing != "full":
            self.saved.fetch_below()
        x, out, lse = (self.saved.take(name) for name in ("x", "out", "lse"))
        if x is None:
            raise RuntimeError(
                "the backward of a block can run once: it empties what the forward saved; run the forward again, or "
                "use activation_checkpointing=none with retain_graph=True"
            )
        if out is None or lse is None:  # "full": the attention is computed again
            qkv = self._qkv(x)
            out, lse, shared = attention_forward(qkv[0], qkv[1], qkv[2], self.spec, self.sink)
        else:
            qkv = [kept for kept in map(self.saved.take, "qkv") if kept is not None]
            lse, shared = lse.transpose(1, 2), self._shared
        # z  ⇒  dout = dO, dx of the residual path, and delta = rowsum(dO ∘ O) if a kernel has it on the way.
        moments, self._moments = self._moments, []
        dx, dout, delta, gradients = self.parts.output_gradients(x, out.flatten(0, 1), dz.contiguous(), moments)
        if delta is not None:
            delta = torch.unflatten(delta, 0, self.shape)
        self._for_attention = _ForAttention(x, dx, qkv, out, lse, delta, shared)
        return dout, gradients

    def attention_backward(self, dout: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Return the gradients of the block's input, of the sinks and of the weights before the attention."""
        kept, self._for_attention = self._for_attention, None
        assert kept is not None
        dout = torch.unflatten(dout, 0, self.shape)
        delta, dsink = kept.delta, None
        if self.sink is not None:
            delta = delta_of(dout, kept.out, kept.lse, None) if delta is None else delta
            dsink = sink_gradient(self.sink, kept.lse, delta)
        start = start_attention_backward(dout, kept.out, kept.lse, self.spec, delta, narrow=False)
        x, dx, qkv, shared = kept.x, kept.dx, kept.qkv, kept.shared
        del kept  # and with it the output: the kernel may not need it any more, as it has LSE and delta
        q, k, v = qkv or self._qkv(x)
        # P = exp(s - LSE), dS = P ∘ (dO Vᵀ - delta)  ⇒  dQ, dK, dV, as wide as they were summed.
        gradients = attention_backward(start, q, k, v, shared, self.spec)
        del q, k, v, qkv, start, dout, delta
        assert self.saved is not None
        self.saved.fetch_below()  # "full" waits until now, when most memory is free again
        # x reaches z through q, k and v too  ⇒  dx grows by J_LNᵀ du.
        return dx, dsink, self.parts.add_projection_gradients(x, tuple(part.flatten(0, 1) for part in gradients), dx)

    def _qkv(self, x: Tensor) -> list[Tensor]:
        return [torch.unflatten(part, 0, self.shape) for part in self.parts.projections(x)]


class _ForAttention(NamedTuple):
    """Carry tensors from the backward of the output to that of the attention; empty ``qkv`` is recomputed there."""

    x: Tensor
    dx: Tensor
    qkv: list[Tensor]
    out: Tensor
    lse: Tensor
    delta: Tensor | None
    shared: list[Tensor]


class _Attention(torch.autograd.Function):
    """Compute the attention and all before it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: BlockRun, sink: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.run = run
        return run.attention(x)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dx, dsink, gradients = ctx.run.attention_backward(dout)
        return dx, None, dsink, *gradients


class _Output(torch.autograd.Function):
    """Compute what follows the attention.

    ``x`` reaches the output on two paths. :class:`_Attention` returns the sum of both gradients, which are added in one
    buffer, so the gradient of ``x`` here is None.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, run: BlockRun, *weights: Tensor) -> Tensor:
        ctx.run = run
        return run.output(x, out)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        dout, gradients = ctx.run.output_backward(dz)
        return None, dout, None, *gradients
