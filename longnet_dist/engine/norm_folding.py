"""LayerNorms whose affine parameters are folded into the linear layers that follow them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

# A LayerNorm of a block, and the linear layers that take its output.
_LAYERS = {
    "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.inner_attn_ln": ("self_attn.out_proj",),
    "final_layer_norm": ("ffn.fc1",),
    "ffn.ffn_layernorm": ("ffn.fc2",),
}


def fold_norms(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Return ``weights`` without those of the norms, which the linear layers behind them take over.

    .. math::
        (\hat x ∘ γ + β)W^\top + b = \hat x W'^\top + b', \qquad W' = W ∘ γ, \qquad b' = b + Wβ .

    The gradients of γ and β follow from those of :math:`W'` and :math:`b'`. That spares two sums over all tokens for
    each norm.

    Args:
        weights: parameters of a block by name; norms and layers that are not among them are left alone.
    """
    changed = dict(weights)
    for norm, linear in _pairs(weights):
        weight = weights[f"{linear}.weight"]
        # b' = b + W β, W' = W ∘ γ: γ scales the columns of W, one for each channel of x̂.
        changed[f"{linear}.bias"] = weights[f"{linear}.bias"] + (weight * weights[f"{norm}.bias"]).sum(-1)
        changed[f"{linear}.weight"] = weight * weights[f"{norm}.weight"]
        changed.pop(f"{norm}.weight", None)
        changed.pop(f"{norm}.bias", None)
    return changed


def unfold_gradients(gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Return the gradients of ``weights`` from those of ``fold_norms(weights)``, in the precision of these.

    With :math:`dW'` and :math:`db'` given, the chain rule through :math:`W' = W ∘ γ` and :math:`b' = b + Wβ` gives

    .. math::
        dW = dW' ∘ γ + db'\, β^\top, \qquad dγ = \sum_o dW'_{o} ∘ W_{o}, \qquad dβ = db' W, \qquad db = db' .

    A norm with several layers behind it (queries, keys, values) sums its gradients over them.
    """
    found = dict(gradients)
    for norm, linear in _pairs(weights):
        gain, shift = weights[f"{norm}.weight"], weights[f"{norm}.bias"]
        wide, bias = gradients[f"{linear}.weight"], gradients[f"{linear}.bias"]
        weight = weights[f"{linear}.weight"].to(wide.dtype)
        # dγ = Σ_o dW'_o ∘ W_o, dβ = db' W; both are added up over the layers behind one norm.
        for name, part in ((f"{norm}.weight", (wide * weight).sum(0)), (f"{norm}.bias", bias @ weight)):
            found[name] = found[name] + part if name in found else part
        # dW = dW' ∘ γ + db' βᵀ, and db = db' as it is.
        found[f"{linear}.weight"] = wide * gain + bias[:, None] * shift
    return found


def _pairs(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    names = ((norm, linear) for norm, linears in _LAYERS.items() for linear in linears)
    return ((norm, linear) for norm, linear in names if f"{norm}.weight" in weights)
