"""The row-wise parts of a block on all its tokens, tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longnet_dist.attention.positions import RotaryTable
from longnet_dist.engine.norm_folding import fold_norms, unfold_gradients
from longnet_dist.engine.row_functions import (
    PROJECTIONS,
    STACKED,
    Weights,
    add_projection_gradients,
    after_attention,
    before_attention,
    is_gated,
    linear_layer,
    norm_input,
    write_attention_residual,
    write_output_gradients,
    write_queries_and_keys,
)
from longnet_dist.numerics import wide_dtype
from longnet_dist.ops.compiled import run
from longnet_dist.ops.gated_norm.choice import gated_norm_of
from longnet_dist.ops.gelu_norm.choice import GeluNorm
from longnet_dist.ops.join_gradients.choice import JoinGradients, join_gradients_of
from longnet_dist.ops.matmul.choice import REFERENCE, Matmul, Normed
from longnet_dist.ops.norm_gradients.choice import NormGradients, gives_delta, norm_gradients_of

_BEFORE = tuple(f"{name}." for name in ("self_attn_layer_norm", *PROJECTIONS))
_BEFORE += ("self_attn.q_norm.", "self_attn.k_norm.")


@dataclass(frozen=True)
class RowParts:
    """Compute the row-wise parts of a block, tile by tile.

    Autograd records :meth:`graph_before` and :meth:`graph_after`. The other methods run without graph, with the
    hand-written gradients of :mod:`longnet_dist.engine.row_functions`. Gradients of weights are summed over the tiles
    in float32 or float64.

    Attributes:
        weights: the block's parameters by name.
        table: rotations of the tokens; None without positions.
        head_dim: ``D``.
        eps: epsilon of the norms.
        tile: tokens at once; None for all.
        compile: whether the parts are compiled.
        matmul: kernels of the linear layers, where autograd does not record.
    """

    weights: Weights
    table: RotaryTable | None
    head_dim: int
    eps: float
    tile: int | None = None
    compile: bool = False
    matmul: Matmul = REFERENCE

    @cached_property
    def before(self) -> dict[str, Tensor]:
        """Return the weights that act before the attention."""
        return {name: weight for name, weight in self.weights.items() if name.startswith(_BEFORE)}

    @cached_property
    def after(self) -> dict[str, Tensor]:
        """Return the weights that act behind the attention."""
        return {name: weight for name, weight in self.weights.items() if not name.startswith(_BEFORE)}

    @cached_property
    def middle(self) -> GeluNorm:
        """Return the kernels of the feed-forward network's middle, ``LayerNorm(gelu(h))`` or that of a gated one."""
        weight = self.weights["ffn.fc2.weight"]
        of = gated_norm_of if is_gated(self.weights) else GeluNorm.of
        return of(weight.device, weight.dtype, weight.shape[1])

    @cached_property
    def join_gradients(self) -> JoinGradients:
        """Return the kernel that puts the gradients of q, k, v side by side."""
        heads, kv_heads, _ = self._heads
        weight = self.weights["self_attn.q_proj.weight"]
        return join_gradients_of(weight.device, weight.dtype, self.head_dim, heads, kv_heads)

    @cached_property
    def norm_gradients(self) -> NormGradients:
        """Return the backward of the norms of the model's width."""
        weight = self.weights["self_attn.q_proj.weight"]
        return norm_gradients_of(weight.device, weight.dtype, weight.shape[1])

    def graph_before(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return q, k, v ``(n, heads, D)``; autograd records it."""
        parts = [self._run(before_attention, x[rows], *self._before(rows, self.before)) for rows in self._tiles(x)]
        return tuple(_joined(tiles) for tiles in zip(*parts, strict=True))

    def graph_after(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the block's output ``(n, E)``; autograd records it."""
        return _joined(
            [self._run(after_attention, x[rows], out[rows], self.after, self.eps) for rows in self._tiles(x)]
        )

    def projections(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return q, k, v ``(n, heads, D)``."""
        x, weights = x.detach(), self._for_matmul(self.before)
        q, k, v = (x.new_empty(len(x), number, self.head_dim) for number in self._heads)
        for rows in self._tiles(x):
            if self.table and self._matmul_rotates:
                normed = self._run(norm_input, x[rows], weights, self.eps, self.matmul)
                for name, table, part in zip(PROJECTIONS[:2], self.table.rows(rows), (q, k), strict=True):
                    self.matmul.write_rotated(normed, *linear_layer(weights, name), table, part[rows].flatten(1))
            else:
                given = x[rows], *self._before(rows, weights), self.matmul
                normed = self._run(write_queries_and_keys, *given, q[rows], k[rows])
            self.matmul.write_linear(normed, *linear_layer(weights, PROJECTIONS[2]), None, v[rows].flatten(1))
        return q, k, v

    def output(self, x: Tensor, out: Tensor) -> tuple[Tensor, list[Normed]]:
        """Return the block's output ``(n, E)`` and, for each tile, its norms' moments, if ``matmul`` uses them."""
        x, out, weights = x.detach(), out.detach(), self._for_matmul(self.after)
        z, moments = torch.empty_like(x), []
        for rows in self._tiles(x):
            given, tile = (x[rows], out[rows], weights, self.eps, self.matmul, self.middle), z[rows]
            f, of_tile = self._run(write_attention_residual, *given, tile)
            self.matmul.write_linear((f,), *linear_layer(weights, "ffn.fc2"), tile, tile)
            moments.append(of_tile)
        return z, moments

    def output_gradients(
        self, x: Tensor, out: Tensor, dz: Tensor, moments: Sequence[Normed]
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
        """Return ``dx`` of the residual path, ``dout``, ``delta`` and gradients of the weights behind the attention.

        ``moments`` are those of :meth:`output`, or none. ``delta`` is ``rowsum(dout ∘ out) (n, H)`` in float32 where a
        kernel gives it for free, else None.
        """
        dx, dout, weights = torch.empty_like(x), torch.empty_like(out), self._run(fold_norms, _detached(self.after))
        with_delta = gives_delta(x.device, x.dtype, x.shape[1], out.shape[1])
        delta = x.new_empty(out.shape[:2], dtype=torch.float32) if with_delta else None
        # A weight acts on every token, so its gradient is a sum over tokens: over the rows of a tile, then over tiles.
        sums, tiles = _zeros(weights), list(self._tiles(x))
        for rows, of_tile in zip(tiles, moments or [()] * len(tiles), strict=True):
            given = x[rows], out[rows], dz[rows], of_tile, weights, self.eps, self.matmul
            written = dx[rows], dout[rows].flatten(-2), None if delta is None else delta[rows]
            self._run(write_output_gradients, *given, self.middle, self.norm_gradients, *written, sums)
        return dx, dout, delta, self._gradients(sums, self.after)

    def add_projection_gradients(self, x: Tensor, gradients: tuple[Tensor, ...], dx: Tensor) -> list[Tensor]:
        """Add what comes through q, k, v to ``dx``; return the gradients of the weights before the attention."""
        # One linear layer [W_q; W_k; W_v]: one matmul for du, one for dW.
        folded_weights = self._run(fold_norms, _detached(self.before))
        weights = _stacked(folded_weights)
        sums = _zeros(weights)
        for rows in self._tiles(x):
            tiles = tuple(gradient[rows] for gradient in gradients)
            given = x[rows], tiles, *self._before(rows, weights), self.matmul
            self._run(add_projection_gradients, *given, self.join_gradients, self.norm_gradients, dx[rows], sums)
        return self._gradients(_unstacked(sums, folded_weights), self.before)

    @property
    def _heads(self) -> list[int]:
        """Return the numbers of heads of queries, keys and values."""
        return [len(self.weights[f"{name}.bias"]) // self.head_dim for name in PROJECTIONS]

    @property
    def _matmul_rotates(self) -> bool:
        """Whether the kernels that compute queries and keys can rotate them as well."""
        return self.head_dim in self.matmul.rotated_dims and "self_attn.q_norm.weight" not in self.weights

    def _for_matmul(self, weights: Weights) -> dict[str, Tensor]:
        """Return the weights without graph, in the form that ``matmul`` takes."""
        plain = _detached(weights)
        found: dict[str, Tensor] = self._run(fold_norms, plain) if self.matmul.folded else plain
        return found

    def _gradients(self, sums: Weights, weights: Weights) -> list[Tensor]:
        found: list[Tensor] = self._run(_of_weights, sums, _detached(weights))
        return found

    def _before(self, rows: slice, weights: Weights) -> tuple[RotaryTable | None, Weights, int, float]:
        return self.table and self.table.rows(rows), weights, self.head_dim, self.eps

    def _tiles(self, x: Tensor) -> Iterator[slice]:
        tile = self.tile or len(x)
        return (slice(first, min(first + tile, len(x))) for first in range(0, len(x), tile))

    def _run(self, part: Callable[..., Any], *given: Any) -> Any:
        return run(part, self.compile, *given)


def _joined(tiles: Sequence[Tensor]) -> Tensor:
    return tiles[0] if len(tiles) == 1 else torch.cat(tuple(tiles))


def _detached(weights: Weights) -> dict[str, Tensor]:
    """Return the weights without graph, since a compiled call would ask for gradients otherwise.

    It is done for each call, because ZeRO moves its weights.
    """
    return {name: weight.detach() for name, weight in weights.items()}


def _zeros(weights: Weights) -> dict[str, Tensor]:
    """Return zeros in which gradients are summed over tiles."""
    return {name: torch.zeros_like(weight, dtype=wide_dtype(weight.dtype)) for name, weight in weights.items()}


def _of_weights(sums: Weights, weights: Weights) -> list[Tensor]:
    """Return the gradients of ``weights`` from the sums of those of ``fold_norms(weights)``."""
    # dW', db'  ⇒  dW, dγ, dβ of the norm before; see norm_folding. Sums are wide, gradients in the weights' dtype.
    gradients = unfold_gradients(sums, weights)
    return [gradients[name].to(weight.dtype) for name, weight in weights.items()]


def _stacked(weights: Weights) -> dict[str, Tensor]:
    """Return ``weights`` with the three projections stacked into one linear layer."""
    # [q, k, v] = u [W_q; W_k; W_v]ᵀ + [b_q; b_k; b_v]
    kinds = "weight", "bias"
    layers = {STACKED + kind: torch.cat([weights[f"{name}.{kind}"] for name in PROJECTIONS]) for kind in kinds}
    return layers | {name: weight for name, weight in weights.items() if not name.startswith(PROJECTIONS)}


def _unstacked(sums: Weights, weights: Weights) -> dict[str, Tensor]:
    """Split the sums for ``_stacked(weights)`` into sums by the names of ``weights``."""
    # d[W_q; W_k; W_v] = [dW_q; dW_k; dW_v], rows in the order of the outputs; the biases likewise.
    lengths = [len(weights[f"{name}.bias"]) for name in PROJECTIONS]
    found = {name: part for name, part in sums.items() if not name.startswith(STACKED)}
    for kind in ("weight", "bias"):
        parts = torch.split(sums[STACKED + kind], lengths)
        found |= {f"{name}.{kind}": part for name, part in zip(PROJECTIONS, parts, strict=True)}
    return found
