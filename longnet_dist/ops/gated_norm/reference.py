"""The middle of a gated feed-forward network, ``LayerNorm(silu(g) ∘ u)``, and its gradient without a graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from longnet_dist.numerics import wide_dtype


def gated_norm(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return ``LayerNorm(silu(g) ∘ u) (rows, F)`` for ``h = [g, u] (rows, 2·F)``.

    Weight and bias ``(F,)`` are the norm's, or None.
    """
    gate, up = h.chunk(2, -1)
    return F.layer_norm(F.silu(gate) * up, up.shape[-1:], weight, bias, eps)


def gated_norm_gradients(dy: Tensor, h: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return ``y (rows, F)``, ``dh (rows, 2·F)`` and ``Σ dh (2·F,)`` for ``y = LayerNorm(silu(g) ∘ u)``.

    The norm has no weights. Let :math:`S` be the logistic function, :math:`s = \mathrm{silu}(g) = g\,S(g)` and
    :math:`a = s ∘ u`. Let σ be the deviation of a row of ``a`` and :math:`\overline{\,\cdot\,}` an average over the
    row. By the chain rule

    .. math::
        da = J_{LN}^\top dy = \frac1σ\left(dy - \overline{dy} - y\,\overline{dy ∘ y}\right), \qquad
        du = da ∘ s, \qquad dg = da ∘ u ∘ s', \qquad s' = S(g)\,(1 + g\,(1 - S(g))) .

    A kernel may overwrite ``h`` and ``dy``.

    Args:
        dy: the gradient of ``y``, ``(rows, F)``.
        h: ``[g, u] (rows, 2·F)``, in the dtype of ``dy``.
        eps: of the norm.
    """
    y, backward, *_ = torch.func.vjp(lambda h: gated_norm(h, None, None, eps), h)
    (dh,) = backward(dy)
    # The linear layer before adds its bias to each row, h = … + b  ⇒  db = Σ dh.
    return y, dh, dh.sum(0, dtype=wide_dtype(dh.dtype))
