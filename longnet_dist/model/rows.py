"""The parts of a block that treat every row alone: all but its attention.

Functions of tensors, so that torch can compile and differentiate them: rows ``x (n, E)`` of all sequences of a batch,
one behind the other, and the block's parameters by name. What is larger than a tile of rows is written into the
caller's buffers: a compiled function stores there what it computes, without a copy. A matrix product that is a result
as it stands comes behind the compiled function, which would copy it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longnet_dist.attention.module import normed_heads, placed, project
from longnet_dist.attention.positions import RotaryTable, rotate
from longnet_dist.model.feed_forward import feed_forward
from longnet_dist.model.folded import folded, unfolded_gradients
from longnet_dist.numerics import wide_dtype
from longnet_dist.ops.compiled import run
from longnet_dist.ops.gelu_norm.choice import GeluNorm
from longnet_dist.ops.join_gradients.choice import JoinGradients, join_gradients_of
from longnet_dist.ops.matmul.choice import TORCH, Normed, Products
from longnet_dist.ops.norm_gradients.choice import NormGradients, gives_dots, norm_gradients_of

Weights = Mapping[str, Tensor]
_PROJECTIONS = tuple(f"self_attn.{name}_proj" for name in "qkv")
_STACKED = "self_attn.qkv_proj."
_BEFORE = tuple(f"{name}." for name in ("self_attn_layer_norm", *_PROJECTIONS))
_BEFORE += ("self_attn.q_norm.", "self_attn.k_norm.")


def before_attention(
    x: Tensor, table: RotaryTable | None, weights: Weights, head_dim: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``(n, H, D)``, keys and values ``(n, Hkv, D)``."""
    x = _norm(x, weights, "self_attn_layer_norm", eps)
    return project(x, table, _part(weights, "self_attn."), head_dim, eps)


def after_attention(x: Tensor, out: Tensor, weights: Weights, eps: float) -> Tensor:
    """The block's output ``(n, E)`` from its input and the attention's output ``(n, H, D)``."""
    out = _norm(out.flatten(-2), weights, "self_attn.inner_attn_ln", eps)
    x = x + F.linear(out, weights["self_attn.out_proj.weight"], weights["self_attn.out_proj.bias"])
    return x + feed_forward(_norm(x, weights, "final_layer_norm", eps), _part(weights, "ffn."), eps)


def normed_before(x: Tensor, weights: Weights, eps: float, products: Products) -> Normed:
    """The first norm of :func:`before_attention`."""
    return _normed(x, weights, "self_attn_layer_norm", eps, products)


def write_queries_and_keys(
    x: Tensor,
    table: RotaryTable | None,
    weights: Weights,
    head_dim: int,
    eps: float,
    products: Products,
    q: Tensor,
    k: Tensor,
) -> Normed:
    """:func:`before_attention` without the values; the normed rows, of which they are a product."""
    normed = normed_before(x, weights, eps, products)
    queries, keys = (
        torch.unflatten(products.linear(normed, *_map(weights, name), None), -1, (-1, head_dim))
        for name in _PROJECTIONS[:2]
    )
    queries, keys = placed(queries, keys, table, _part(weights, "self_attn."), eps)
    q.copy_(queries)
    k.copy_(keys)
    return normed


def write_first_sum(
    x: Tensor,
    out: Tensor,
    weights: Weights,
    eps: float,
    products: Products,
    gelu_norm: GeluNorm,
    z: Tensor,
) -> tuple[Tensor, Normed]:
    """:func:`after_attention` without its last product: what that is added to, in ``z``, and its factor ``(n, F)``.

    The second result are the moments of the two norms that the products are before, or nothing.
    """
    normed_out = _normed(out.flatten(-2), weights, "self_attn.inner_attn_ln", eps, products)
    products.write_linear(normed_out, *_map(weights, "self_attn.out_proj"), x, z)
    normed_sum = _normed(z, weights, "final_layer_norm", eps, products)
    inner = products.linear(normed_sum, *_map(weights, "ffn.fc1"), None)
    gain, shift = weights.get("ffn.ffn_layernorm.weight"), weights.get("ffn.ffn_layernorm.bias")
    return gelu_norm.forward(inner, gain, shift, eps), (*normed_out[1:], *normed_sum[1:])


def write_output_gradients(
    x: Tensor,
    out: Tensor,
    dz: Tensor,
    moments: Normed,
    weights: Weights,
    eps: float,
    products: Products,
    gelu_norm: GeluNorm,
    norm_gradients: NormGradients,
    dx: Tensor,
    dout: Tensor,
    delta: Tensor | None,
    sums: dict[str, Tensor],
) -> None:
    """Backward of :func:`after_attention`: writes ``dx`` and ``dout``, adds the gradients of the weights to ``sums``.

    ``delta (n, H)``, if given, becomes ``rowsum(dout ∘ out)`` of every head.

    It computes the forward again, without the last matrix product, which the gradient does not need, and without the
    moments, if :func:`write_first_sum` gave them. ``weights`` are folded: the norms have none. ``dout (n, H·D)``: what
    is written must not be a view that the function itself makes, whose place torch's compiler takes from the first
    call.
    """
    attended = out.flatten(-2)
    normed = _normed(attended, weights, "self_attn.inner_attn_ln", eps, products, moments[:2])
    total = products.linear(normed, *_map(weights, "self_attn.out_proj"), x)
    normed = _normed(total, weights, "final_layer_norm", eps, products, moments[2:])
    inner = products.linear(normed, *_map(weights, "ffn.fc1"), None)

    dfactor = products.product(dz, weights["ffn.fc2.weight"])
    factor, dinner, fc1_bias = gelu_norm.gradients(dfactor, inner, eps)
    dnormed = products.product(dinner, weights["ffn.fc1.weight"])
    (out_bias, fc2_bias), normed_sum = norm_gradients(dnormed, total, dz, eps, True, True, dx, None)
    dnormed = products.product(dx, weights["self_attn.out_proj.weight"])
    _, normed_out = norm_gradients(dnormed, attended, None, eps, False, True, dout, delta)
    gradients = {"ffn.fc2.weight": dz.T @ factor, "ffn.fc2.bias": fc2_bias}
    gradients |= {"ffn.fc1.weight": dinner.T @ normed_sum, "ffn.fc1.bias": fc1_bias}
    gradients |= {"self_attn.out_proj.weight": dx.T @ normed_out, "self_attn.out_proj.bias": out_bias}
    _add(sums, gradients)


def add_projection_gradients(
    x: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    table: RotaryTable | None,
    weights: Weights,
    head_dim: int,
    eps: float,
    products: Products,
    join: JoinGradients,
    norm_gradients: NormGradients,
    dx: Tensor,
    sums: dict[str, Tensor],
) -> None:
    """Backward of :func:`before_attention`: adds to ``dx`` and ``sums``; ``gradients`` may be wider than ``x``.

    ``weights`` are folded and stacked. The gradients of the three projections stand side by side, so that they are one
    factor of two matrix products.
    """
    dq, dk, dv = gradients
    gains = {name: weight for name, weight in weights.items() if name.endswith("_norm.weight")}
    if gains:
        heads = [dq.shape[1], dk.shape[1]]
        normed = _normed(x, weights, "self_attn_layer_norm", eps, products)
        weight, bias = (weights[_STACKED + kind][: sum(heads) * head_dim] for kind in ("weight", "bias"))
        again = products.linear(normed, weight, bias, None)
        projected = torch.split(torch.unflatten(again, -1, (-1, head_dim)), heads, 1)
        _, backward, *_ = torch.func.vjp(partial(normed_heads, norm_eps=eps), *projected, *gains.values())
        if table is not None:
            dq, dk = rotate(dq, dk, table.inverse())
        dq, dk, *gain_gradients = backward((dq.to(x.dtype), dk.to(x.dtype)))
        _add(sums, dict(zip(gains, gain_gradients, strict=True)))
    joined, bias_gradient = join(dq, dk, dv, None if gains else table, x.dtype)
    dnormed = products.product(joined, weights[_STACKED + "weight"])
    _, again = norm_gradients(dnormed, x, dx, eps, False, True, dx, None)
    _add(sums, {_STACKED + "weight": joined.T @ again, _STACKED + "bias": bias_gradient})


@dataclass(frozen=True)
class RowParts:
    """The row-wise parts of a block on all its rows, tile by tile; without graph, but for the first two.

    Attributes:
        weights: the block's parameters by name.
        table: positions of the rows; None without.
        head_dim: ``D``.
        eps: epsilon of the norms.
        tile: rows at once; None for all.
        compile: whether the parts are compiled.
        products: of rows and weights, without graph.
    """

    weights: Weights
    table: RotaryTable | None
    head_dim: int
    eps: float
    tile: int | None = None
    compile: bool = False
    products: Products = TORCH

    @cached_property
    def before(self) -> dict[str, Tensor]:
        """The weights that act before the attention."""
        return {name: weight for name, weight in self.weights.items() if name.startswith(_BEFORE)}

    @cached_property
    def after(self) -> dict[str, Tensor]:
        """The weights that act behind it."""
        return {name: weight for name, weight in self.weights.items() if not name.startswith(_BEFORE)}

    @cached_property
    def gelu_norm(self) -> GeluNorm:
        """The middle of the feed-forward network, without graph."""
        weight = self.weights["ffn.fc1.weight"]
        return GeluNorm.of(weight.device, weight.dtype, len(self.weights["ffn.fc1.bias"]))

    @cached_property
    def join_gradients(self) -> JoinGradients:
        """What puts the gradients of the three projections side by side."""
        heads, kv_heads, _ = self._heads
        weight = self.weights["self_attn.q_proj.weight"]
        return join_gradients_of(weight.device, weight.dtype, self.head_dim, heads, kv_heads)

    @cached_property
    def norm_gradients(self) -> NormGradients:
        """The backward of the norms of the model's width."""
        weight = self.weights["self_attn.q_proj.weight"]
        return norm_gradients_of(weight.device, weight.dtype, weight.shape[1])

    def graph_before(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v ``(n, heads, D)`` with their graph."""
        parts = [self._run(before_attention, x[rows], *self._before(rows, self.before)) for rows in self._tiles(x)]
        return tuple(_joined(tiles) for tiles in zip(*parts, strict=True))

    def graph_after(self, x: Tensor, out: Tensor) -> Tensor:
        """The block's output with its graph."""
        return _joined(
            [self._run(after_attention, x[rows], out[rows], self.after, self.eps) for rows in self._tiles(x)]
        )

    def projections(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v ``(n, heads, D)``."""
        x, weights = x.detach(), self._for_products(self.before)
        q, k, v = (x.new_empty(len(x), number, self.head_dim) for number in self._heads)
        for rows in self._tiles(x):
            if self.table and self._matmul_rotates:
                normed = self._run(normed_before, x[rows], weights, self.eps, self.products)
                for name, table, part in zip(_PROJECTIONS[:2], self.table.rows(rows), (q, k), strict=True):
                    self.products.write_rotated(normed, *_map(weights, name), table, part[rows].flatten(1))
            else:
                given = x[rows], *self._before(rows, weights), self.products
                normed = self._run(write_queries_and_keys, *given, q[rows], k[rows])
            self.products.write_linear(normed, *_map(weights, _PROJECTIONS[2]), None, v[rows].flatten(1))
        return q, k, v

    def output(self, x: Tensor, out: Tensor) -> tuple[Tensor, list[Normed]]:
        """The block's output, and for each tile the moments of its norms, if the products are before them."""
        x, out, weights = x.detach(), out.detach(), self._for_products(self.after)
        z, moments = torch.empty_like(x), []
        for rows in self._tiles(x):
            given, tile = (x[rows], out[rows], weights, self.eps, self.products, self.gelu_norm), z[rows]
            factor, of_tile = self._run(write_first_sum, *given, tile)
            self.products.write_linear((factor,), *_map(weights, "ffn.fc2"), tile, tile)
            moments.append(of_tile)
        return z, moments

    def output_gradients(
        self, x: Tensor, out: Tensor, dz: Tensor, moments: Sequence[Normed]
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
        """Gradients of ``x``, beside the attention, of ``out``, and of the weights behind the attention.

        ``moments`` are those of :meth:`output`, or none. The third is ``rowsum(dout ∘ out) (n, H)``, float32, where it
        costs nothing beside.
        """
        dx, dout, weights = torch.empty_like(x), torch.empty_like(out), self._run(folded, _detached(self.after))
        with_delta = gives_dots(x.device, x.dtype, x.shape[1], out.shape[1])
        delta = x.new_empty(out.shape[:2], dtype=torch.float32) if with_delta else None
        sums, tiles = _zeros(weights), list(self._tiles(x))
        for rows, of_tile in zip(tiles, moments or [()] * len(tiles), strict=True):
            given = x[rows], out[rows], dz[rows], of_tile, weights, self.eps, self.products
            written = dx[rows], dout[rows].flatten(-2), None if delta is None else delta[rows]
            self._run(write_output_gradients, *given, self.gelu_norm, self.norm_gradients, *written, sums)
        return dx, dout, delta, self._gradients(sums, self.after)

    def add_projection_gradients(self, x: Tensor, gradients: tuple[Tensor, ...], dx: Tensor) -> list[Tensor]:
        """Add to ``dx`` what comes through q, k, v; gradients of the weights before the attention."""
        folded_weights = self._run(folded, _detached(self.before))
        weights = _stacked(folded_weights)
        sums = _zeros(weights)
        for rows in self._tiles(x):
            tiles = tuple(gradient[rows] for gradient in gradients)
            given = x[rows], tiles, *self._before(rows, weights), self.products
            self._run(add_projection_gradients, *given, self.join_gradients, self.norm_gradients, dx[rows], sums)
        return self._gradients(_unstacked(sums, folded_weights), self.before)

    @property
    def _heads(self) -> list[int]:
        """Of queries, keys, values."""
        return [len(self.weights[f"{name}.bias"]) // self.head_dim for name in _PROJECTIONS]

    @property
    def _matmul_rotates(self) -> bool:
        """Whether the products of queries and keys can turn them."""
        return self.head_dim in self.products.rotated_dims and "self_attn.q_norm.weight" not in self.weights

    def _for_products(self, weights: Weights) -> dict[str, Tensor]:
        """Without graph, in the form that the products take."""
        plain = _detached(weights)
        found: dict[str, Tensor] = self._run(folded, plain) if self.products.folded else plain
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
    """For a compiled function, which asks for gradients otherwise; for one call, because ZeRO moves its weights."""
    return {name: weight.detach() for name, weight in weights.items()}


def _zeros(weights: Weights) -> dict[str, Tensor]:
    """Room for sums over tiles."""
    return {name: torch.zeros_like(weight, dtype=wide_dtype(weight.dtype)) for name, weight in weights.items()}


def _of_weights(sums: Weights, weights: Weights) -> list[Tensor]:
    """Gradients of ``weights`` from the sums of those of ``folded(weights)``."""
    gradients = unfolded_gradients(sums, weights)
    return [gradients[name].to(weight.dtype) for name, weight in weights.items()]


def _stacked(weights: Weights) -> dict[str, Tensor]:
    """``weights`` with the three projections as one map."""
    kinds = "weight", "bias"
    maps = {_STACKED + kind: torch.cat([weights[f"{name}.{kind}"] for name in _PROJECTIONS]) for kind in kinds}
    return maps | {name: weight for name, weight in weights.items() if not name.startswith(_PROJECTIONS)}


def _unstacked(sums: Weights, weights: Weights) -> dict[str, Tensor]:
    """What stands in ``sums`` for ``_stacked(weights)``, by the names of ``weights``."""
    lengths = [len(weights[f"{name}.bias"]) for name in _PROJECTIONS]
    found = {name: part for name, part in sums.items() if not name.startswith(_STACKED)}
    for kind in ("weight", "bias"):
        parts = torch.split(sums[_STACKED + kind], lengths)
        found |= {f"{name}.{kind}": part for name, part in zip(_PROJECTIONS, parts, strict=True)}
    return found


def _norm(x: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    """LayerNorm; with folded weights without its own."""
    return F.layer_norm(x, x.shape[-1:], weights.get(f"{name}.weight"), weights.get(f"{name}.bias"), eps)


def _normed(x: Tensor, weights: Weights, name: str, eps: float, products: Products, moments: Normed = ()) -> Normed:
    """The same, as the products take it; its moments may be known."""
    if moments:
        return x, *moments
    return products.normed(x, weights.get(f"{name}.weight"), weights.get(f"{name}.bias"), eps)


def _map(weights: Weights, name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear map."""
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def _part(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _add(sums: dict[str, Tensor], gradients: Weights) -> None:
    for name, gradient in gradients.items():
        sums[name].add_(gradient)
