r"""The row-wise parts of a block, forward and backward, as functions of tensors.

Torch can compile and differentiate them: they take tokens ``x (n, E)`` of all sequences of a batch, one behind the
other, and the block's parameters by name. Results larger than a tile are written into the caller's buffers: a compiled
function stores there what it computes, without a copy. A matmul that is a result as it stands comes behind the compiled
function, which would copy it.

The notation is that of :class:`~longnet_dist.model.block.Block`. With :math:`\hat x = (x - μ)/σ` for a LayerNorm
without weights (those are folded into the linear layer behind it, see :mod:`longnet_dist.engine.norm_folding`), one
block is

.. math::
    u = \hat x, \quad q, k, v = u W_{q,k,v}^\top + b_{q,k,v}, \quad o = \mathrm{attn}(q, k, v), \quad
    y = x + \hat o W_o^\top + b_o,

.. math::
    h = \hat y W_1^\top + b_1, \qquad f = \widehat{\mathrm{gelu}(h)}, \qquad z = y + f W_2^\top + b_2 .

A gated feed-forward network has :math:`h = [g, u]`, of twice the width, and
:math:`f = \widehat{\mathrm{silu}(g) ∘ u}` in its place; all other equations stay. So the step from ``h`` to ``f`` is a
pair of functions, ``middle``, which :func:`is_gated` chooses.

``d`` before a name is the gradient of the loss with respect to it: ``dz`` comes in, ``dx`` goes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from longnet_dist.attention.positions import RotaryTable, rotate
from longnet_dist.ops.gated_norm.reference import gated_norm
from longnet_dist.ops.gelu_norm.choice import GeluNorm
from longnet_dist.ops.gelu_norm.reference import gelu_norm
from longnet_dist.ops.join_gradients.choice import JoinGradients
from longnet_dist.ops.matmul.choice import Matmul, Normed
from longnet_dist.ops.norm_gradients.choice import NormGradients

Weights = Mapping[str, Tensor]
PROJECTIONS = tuple(f"self_attn.{name}_proj" for name in "qkv")
STACKED = "self_attn.qkv_proj."
"""Prefix of the weight and bias of the three projections as one linear layer."""


def before_attention(
    x: Tensor, table: RotaryTable | None, weights: Weights, head_dim: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries ``(n, H, D)``, keys and values ``(n, Hkv, D)``; autograd may record it."""
    u = _layer_norm(x, weights, "self_attn_layer_norm", eps)
    q, k, v = (torch.unflatten(F.linear(u, *linear_layer(weights, name)), -1, (-1, head_dim)) for name in PROJECTIONS)
    return *_normed_and_rotated(q, k, table, weights, eps), v


def after_attention(x: Tensor, out: Tensor, weights: Weights, eps: float) -> Tensor:
    """Return the block's output ``(n, E)`` for its input and the attention's output ``(n, H, D)``; for autograd."""
    o = _layer_norm(out.flatten(-2), weights, "self_attn.inner_attn_ln", eps)
    y = x + F.linear(o, *linear_layer(weights, "self_attn.out_proj"))
    h = F.linear(_layer_norm(y, weights, "final_layer_norm", eps), *linear_layer(weights, "ffn.fc1"))
    middle = gated_norm if is_gated(weights) else gelu_norm
    f = middle(h, weights["ffn.ffn_layernorm.weight"], weights["ffn.ffn_layernorm.bias"], eps)
    return y + F.linear(f, *linear_layer(weights, "ffn.fc2"))


def norm_input(x: Tensor, weights: Weights, eps: float, matmul: Matmul) -> Normed:
    """Return ``u``, the first norm of :func:`before_attention`, in the form that ``matmul`` takes."""
    return _normed(x, weights, "self_attn_layer_norm", eps, matmul)


def write_queries_and_keys(
    x: Tensor,
    table: RotaryTable | None,
    weights: Weights,
    head_dim: int,
    eps: float,
    matmul: Matmul,
    q: Tensor,
    k: Tensor,
) -> Normed:
    """Write the queries and keys of :func:`before_attention`; return ``u``, of which the values are a matmul."""
    u = norm_input(x, weights, eps, matmul)
    queries, keys = (
        torch.unflatten(matmul.linear(u, *linear_layer(weights, name), None), -1, (-1, head_dim))
        for name in PROJECTIONS[:2]
    )
    queries, keys = _normed_and_rotated(queries, keys, table, weights, eps)
    q.copy_(queries)
    k.copy_(keys)
    return u


def write_attention_residual(
    x: Tensor,
    out: Tensor,
    weights: Weights,
    eps: float,
    matmul: Matmul,
    middle: GeluNorm,
    y: Tensor,
) -> tuple[Tensor, Normed]:
    """Write ``y``; return ``f (n, F)``, so that ``f W_2ᵀ + b_2`` is all that is left to add.

    The second result holds the moments of the norms of ``o`` and ``y``, if ``matmul`` works with moments.
    """
    o = _normed(out.flatten(-2), weights, "self_attn.inner_attn_ln", eps, matmul)
    matmul.write_linear(o, *linear_layer(weights, "self_attn.out_proj"), x, y)
    normed_y = _normed(y, weights, "final_layer_norm", eps, matmul)
    h = matmul.linear(normed_y, *linear_layer(weights, "ffn.fc1"), None)
    gain, shift = weights.get("ffn.ffn_layernorm.weight"), weights.get("ffn.ffn_layernorm.bias")
    return middle.forward(h, gain, shift, eps), (*o[1:], *normed_y[1:])


def write_output_gradients(
    x: Tensor,
    out: Tensor,
    dz: Tensor,
    moments: Normed,
    weights: Weights,
    eps: float,
    matmul: Matmul,
    middle: GeluNorm,
    norm_gradients: NormGradients,
    dx: Tensor,
    dout: Tensor,
    delta: Tensor | None,
    sums: dict[str, Tensor],
) -> None:
    """Write the gradients of :func:`after_attention`: ``dx``, ``dout``, and those of its weights added to ``sums``.

    It recomputes the forward without the last matmul, which no gradient needs, and without the moments that
    :func:`write_attention_residual` gave.

    Args:
        x, out, dz: ``(n, E)``, ``(n, H, D)``, ``(n, E)``.
        moments: those of the forward, or none.
        weights: folded; the norms have none.
        eps, matmul, middle, norm_gradients: of the norms, and the kernels.
        dx: ``(n, E)``, the gradient of the residual path alone.
        dout: ``(n, H·D)``. It must not be a view that this function makes: torch's compiler would take the view's place
            in memory from the first call.
        delta: ``(n, H)`` for ``rowsum(dout ∘ out)`` of each head, or None.
        sums: wide sums over tiles, by the names of ``weights``.
    """
    o = out.flatten(-2)
    normed_o = _normed(o, weights, "self_attn.inner_attn_ln", eps, matmul, moments[:2])
    y = matmul.linear(normed_o, *linear_layer(weights, "self_attn.out_proj"), x)
    normed_y = _normed(y, weights, "final_layer_norm", eps, matmul, moments[2:])
    h = matmul.linear(normed_y, *linear_layer(weights, "ffn.fc1"), None)

    # z = y + f W₂ᵀ + b₂  ⇒  df = dz W₂, dW₂ = dzᵀ f, db₂ = Σ dz.
    df = matmul.matmul(dz, weights["ffn.fc2.weight"])
    # f = LN(a) with a = gelu(h)  ⇒  da = J_LNᵀ df, dh = gelu'(h) ∘ da; f itself comes along, and db₁ = Σ dh.
    # Gated, a = silu(g) ∘ u with h = [g, u]  ⇒  dh = [silu'(g) ∘ u ∘ da, silu(g) ∘ da].
    f, dh, db1 = middle.gradients(df, h, eps)
    # h = ŷ W₁ᵀ + b₁  ⇒  dŷ = dh W₁, dW₁ = dhᵀ ŷ.
    dnormed_y = matmul.matmul(dh, weights["ffn.fc1.weight"])
    # y reaches z directly and through ŷ  ⇒  dy = dz + J_LNᵀ dŷ. This is dx so far, as x reaches y directly.
    # The same pass sums rows: db₂ = Σ dz and, with y = x + ô W_oᵀ + b_o, db_o = Σ dy.
    (db_o, db2), y_hat = norm_gradients(dnormed_y, y, dz, eps, True, True, dx, None)
    dy = dx
    # y = x + ô W_oᵀ + b_o  ⇒  dô = dy W_o, dW_o = dyᵀ ô. Then do = J_LNᵀ dô, since o has no residual path, and
    # delta = rowsum(do ∘ o) of each head for the attention's backward.
    dnormed_o = matmul.matmul(dy, weights["self_attn.out_proj.weight"])
    _, o_hat = norm_gradients(dnormed_o, o, None, eps, False, True, dout, delta)
    gradients = {"ffn.fc2.weight": dz.T @ f, "ffn.fc2.bias": db2}
    gradients |= {"ffn.fc1.weight": dh.T @ y_hat, "ffn.fc1.bias": db1}
    gradients |= {"self_attn.out_proj.weight": dy.T @ o_hat, "self_attn.out_proj.bias": db_o}
    _add(sums, gradients)


def add_projection_gradients(
    x: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    table: RotaryTable | None,
    weights: Weights,
    head_dim: int,
    eps: float,
    matmul: Matmul,
    join: JoinGradients,
    norm_gradients: NormGradients,
    dx: Tensor,
    sums: dict[str, Tensor],
) -> None:
    """Add the gradients that come through q, k, v to ``dx`` and, for the weights before the attention, to ``sums``.

    ``gradients`` of q, k, v may be wider than ``x``. ``weights`` are folded and stacked: the gradients of the three
    projections lie side by side, so that they are one factor of two matmuls.
    """
    dq, dk, dv = gradients
    gains = {name: weight for name, weight in weights.items() if name.endswith("_norm.weight")}
    if gains:
        # q = R RMSNorm(u W_qᵀ + b_q) with the token's linear map R  ⇒  first Rᵀ dq, then the RMSNorm's own gradient,
        # which is that of u W_qᵀ + b_q; k likewise.
        heads = [dq.shape[1], dk.shape[1]]
        u = _normed(x, weights, "self_attn_layer_norm", eps, matmul)
        weight, bias = (weights[STACKED + kind][: sum(heads) * head_dim] for kind in ("weight", "bias"))
        recomputed = matmul.linear(u, weight, bias, None)
        projected = torch.split(torch.unflatten(recomputed, -1, (-1, head_dim)), heads, 1)
        _, backward, *_ = torch.func.vjp(partial(_normed_heads, eps=eps), *projected, *gains.values())
        if table is not None:
            dq, dk = rotate(dq, dk, table.transposed())
        dq, dk, *gain_gradients = backward((dq.to(x.dtype), dk.to(x.dtype)))
        _add(sums, dict(zip(gains, gain_gradients, strict=True)))
    # g = [dq', dk', dv] are the gradients of u Wᵀ + b with W = [W_q; W_k; W_v]. Here dq' = Rᵀ dq, or what the RMSNorm
    # gave above; dk' likewise  ⇒  du = g W, dW = gᵀ u, db = Σ g.
    g, db = join(dq, dk, dv, None if gains else table, x.dtype)
    du = matmul.matmul(g, weights[STACKED + "weight"])
    # x reaches the output directly (dx so far) and through u = x̂  ⇒  dx += J_LNᵀ du.
    _, u_hat = norm_gradients(du, x, dx, eps, False, True, dx, None)
    _add(sums, {STACKED + "weight": g.T @ u_hat, STACKED + "bias": db})


def is_gated(weights: Weights) -> bool:
    """Return whether the feed-forward network is gated: its first linear layer gives two numbers for one of the last.

    ``weights`` are those behind the attention, folded or not.
    """
    return len(weights["ffn.fc1.weight"]) != weights["ffn.fc2.weight"].shape[1]


def linear_layer(weights: Weights, name: str) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear layer."""
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def _normed_and_rotated(
    q: Tensor, k: Tensor, table: RotaryTable | None, weights: Weights, eps: float
) -> tuple[Tensor, Tensor]:
    """Return queries and keys ``(n, heads, D)`` as the attention takes them, from those that the projections give."""
    if "self_attn.q_norm.weight" in weights:
        q, k = _normed_heads(q, k, weights["self_attn.q_norm.weight"], weights["self_attn.k_norm.weight"], eps)
    return (q, k) if table is None else rotate(q, k, table)


def _normed_heads(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Apply RMSNorm to each head's query and key, ``(n, heads, D)``; gains ``(D,)``."""
    return F.rms_norm(q, q_gain.shape, q_gain, eps), F.rms_norm(k, k_gain.shape, k_gain, eps)


def _layer_norm(x: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    """Apply LayerNorm; folded weights have none of its own."""
    return F.layer_norm(x, x.shape[-1:], weights.get(f"{name}.weight"), weights.get(f"{name}.bias"), eps)


def _normed(x: Tensor, weights: Weights, name: str, eps: float, matmul: Matmul, moments: Normed = ()) -> Normed:
    """Apply LayerNorm in the form that ``matmul`` takes; its moments may be known."""
    if moments:
        return x, *moments
    return matmul.normed(x, weights.get(f"{name}.weight"), weights.get(f"{name}.bias"), eps)


def _add(sums: dict[str, Tensor], gradients: Weights) -> None:
    for name, gradient in gradients.items():
        sums[name].add_(gradient)
