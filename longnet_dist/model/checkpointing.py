"""A block's forward and backward, and what it keeps between them.

Two autograd Functions make a block: the attention with all that comes before it, and what comes behind it. Between
forward and backward a block keeps its input (``full``), or its input and what the attention gave (``selective``) and,
where there is room, what it was given (``projections``). The
rest is computed again in backward, row-wise parts tile by tile and each just before its own gradient, so that only
``x, q, k, v``, the attention's output and their gradients ever exist whole. ``none`` leaves all to autograd.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longnet_dist.attention.functional import (
    AttentionSpec,
    attend,
    attention_backward,
    attention_forward,
    start_attention_backward,
)
from longnet_dist.config.schema import TrainConfig
from longnet_dist.model.offload import Shelf
from longnet_dist.model.rows import RowParts
from longnet_dist.ops.matmul.choice import Normed, ProductsName

Checkpointing = Literal["none", "projections", "selective", "full"]


@dataclass(frozen=True)
class Execution:
    """How a model is computed; what it computes stays the same.

    Attributes:
        checkpointing: what a block keeps for backward: ``none`` all that autograd does, ``selective`` its input and the
            attention's output, ``projections`` its queries, keys and values as well, ``full`` its input.
        keep_projections: blocks, from the last one down, that keep ``projections`` where the others are ``selective``.
        offload: whether that, but for the projections, waits in the memory of the host; not with ``none``.
        resident: of how many blocks, the last ones, it stays on the device all the same; at least 1.
        offload_projections: of how many of the blocks with projections, the first ones, these wait there as well.
        tile: rows that are projected, normed and fed forward at once; None for all.
        compile: whether these row-wise parts are compiled, in training and in streams.
        products: whose products of rows and weights they take where they are compiled.
    """

    checkpointing: Checkpointing = "none"
    keep_projections: int = 0
    offload: bool = False
    resident: int = 1
    offload_projections: int = 0
    tile: int | None = None
    compile: bool = False
    products: ProductsName = "auto"

    @classmethod
    def of(cls, train: TrainConfig, device_type: str) -> Execution:
        """As a run's configuration says, on a kind of device, ``"cuda"`` or ``"cpu"``."""
        return cls(
            train.activation_checkpointing,
            train.keep_projections,
            train.offload_activations,
            train.resident,
            train.offload_projections,
            train.feed_forward_tile,
            train.compiles(device_type),
            train.products,
        )

    def of_blocks(self, layers: int) -> list[Execution]:
        """Of each block."""
        kept = min(self.keep_projections, layers)
        waiting, keeping = min(self.offload_projections, kept), replace(self, checkpointing="projections")
        blocks = [self] * (layers - kept) + [keeping] * waiting
        blocks += [replace(keeping, offload_projections=0)] * (kept - waiting)
        waits = max(layers - self.resident, 0)
        return blocks[:waits] + [replace(block, offload=False) for block in blocks[waits:]]

    def compiles(self, training: bool, streamed: bool) -> bool:
        """Whether a pass is compiled; other evaluations come in too many shapes to compile for each."""
        return self.compile and (training or streamed)


@dataclass
class Passage:
    """One pass of the rows of a batch through one block.

    Attributes:
        parts: the row-wise parts of the block.
        spec: its attention.
        checkpointing: what it keeps.
        shape: batch and rows of a sequence.
        shelf: where it keeps it; None if there will be no backward.
        projections_stay: whether its projections stay on the device where the rest is offloaded.
    """

    parts: RowParts
    spec: AttentionSpec
    checkpointing: Checkpointing
    shape: tuple[int, int]
    shelf: Shelf | None
    projections_stay: bool = True
    _shared: list[Tensor] = field(default_factory=list, init=False)
    _moments: list[Normed] = field(default_factory=list, init=False)
    _for_attention: _ForAttention | None = field(default=None, init=False)

    def run(self, x: Tensor) -> Tensor:
        """The block's output ``(B·n, E)`` for its input ``(B·n, E)``."""
        if self.checkpointing == "none":
            q, k, v = (torch.unflatten(part, 0, self.shape) for part in self.parts.graph_before(x))
            out, _ = attend(q, k, v, self.spec)
            return self.parts.graph_after(x, out.flatten(0, 1))
        out = _Attention.apply(x, self, *self.parts.before.values())  # type: ignore[no-untyped-call]
        z: Tensor = _Output.apply(x, out, self, *self.parts.after.values())  # type: ignore[no-untyped-call]
        return z

    def attention(self, x: Tensor) -> Tensor:
        """The attention's output ``(B·n, H, D)``, without graph."""
        projections = self._projections(x)
        out, lse, shared = self._attend(*projections)
        if self.shelf is not None:
            self.shelf.put("x", x)
            if self.checkpointing != "full":
                self.shelf.put("out", out)
                self.shelf.put("lse", lse.transpose(1, 2).contiguous())
                self._shared = shared
            if self.checkpointing == "projections":
                for name, tensor in zip("qkv", projections, strict=True):
                    self.shelf.put(name, tensor, self.projections_stay)
        return out.flatten(0, 1)

    def output(self, x: Tensor, out: Tensor) -> Tensor:
        """The block's output, without graph."""
        z, moments = self.parts.output(x, out)
        if self.checkpointing != "full":
            self._moments = moments
        return z

    def output_backward(self, dz: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the attention's output and of the weights behind it."""
        assert self.shelf is not None
        self.shelf.fetch()
        if self.checkpointing != "full":
            self.shelf.fetch_below()
        x, out, lse = (self.shelf.take(name) for name in ("x", "out", "lse"))
        assert x is not None, "the backward of a block can run once"
        if out is None or lse is None:
            projections = self._projections(x)
            out, lse, shared = self._attend(*projections)
        else:
            projections = [kept for kept in map(self.shelf.take, "qkv") if kept is not None]
            lse, shared = lse.transpose(1, 2), self._shared
        moments, self._moments = self._moments, []
        dx, dout, delta, gradients = self.parts.output_gradients(x, out.flatten(0, 1), dz.contiguous(), moments)
        if delta is not None:
            delta = torch.unflatten(delta, 0, self.shape)
        self._for_attention = _ForAttention(x, dx, projections, out, lse, delta, shared)
        return dout, gradients

    def attention_backward(self, dout: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the block's input and of the weights before the attention."""
        kept, self._for_attention = self._for_attention, None
        assert kept is not None
        dout = torch.unflatten(dout, 0, self.shape)
        start = start_attention_backward(dout, kept.out, kept.lse, self.spec, kept.delta, narrow=False)
        x, dx, projections, shared = kept.x, kept.dx, kept.projections, kept.shared
        del kept  # and with it the output: the kernel may have no need of it any more
        q, k, v = projections or self._projections(x)
        gradients = attention_backward(start, q, k, v, shared, self.spec)
        del q, k, v, projections, start, dout
        assert self.shelf is not None
        self.shelf.fetch_below()  # which "full" leaves until now, when most memory is free again
        return dx, self.parts.add_projection_gradients(x, tuple(part.flatten(0, 1) for part in gradients), dx)

    def _projections(self, x: Tensor) -> list[Tensor]:
        return [torch.unflatten(part, 0, self.shape) for part in self.parts.projections(x)]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        return attention_forward(q, k, v, self.spec)


class _ForAttention(NamedTuple):
    """What goes from the backward of the output to that of the attention; without projections, they are made again."""

    x: Tensor
    dx: Tensor
    projections: list[Tensor]
    out: Tensor
    lse: Tensor
    delta: Tensor | None
    shared: list[Tensor]


class _Attention(torch.autograd.Function):
    """The attention and all before it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, passage: Passage, *weights: Tensor) -> Tensor:
        ctx.passage = passage
        return passage.attention(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dx, gradients = ctx.passage.attention_backward(dout)
        return dx, None, *gradients


class _Output(torch.autograd.Function):
    """What comes behind the attention. The gradient of ``x`` leaves in one piece, through :class:`_Attention`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, passage: Passage, *weights: Tensor) -> Tensor:
        ctx.passage = passage
        return passage.output(x, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        dout, gradients = ctx.passage.output_backward(dz)
        return None, dout, None, *gradients
