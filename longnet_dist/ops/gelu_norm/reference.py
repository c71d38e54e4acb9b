"""The middle of a feed-forward network, ``LayerNorm(gelu(h))``, and its gradient without a graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gelu_norm(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return ``LayerNorm(gelu(h)) (rows, F)``; weight and bias ``(F,)`` are the norm's, or None."""
    return F.layer_norm(F.gelu(h), h.shape[-1:], weight, bias, eps)


def gelu_norm_gradients(dy: Tensor, h: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return ``y`` and ``dh (rows, F)`` and ``Σ dh (F,)``, for ``y = LayerNorm(gelu(h))`` without weights.

    Let :math:`a = \mathrm{gelu}(h) = h\,Φ(h)` with the normal distribution Φ and its density φ. Let σ be the deviation
    of a row of ``a`` and :math:`\overline{\,\cdot\,}` an average over the row. By the chain rule

    .. math::
        da = J_{LN}^\top dy = \frac1σ\left(dy - \overline{dy} - y\,\overline{dy ∘ y}\right), \qquad
        dh = da ∘ \mathrm{gelu}'(h), \qquad \mathrm{gelu}'(h) = Φ(h) + h\,φ(h) .

    A kernel may overwrite ``h`` and ``dy`` with its results.

    Args:
        dy: the gradient of ``y``, ``(rows, F)``.
        h: ``(rows, F)``, in the dtype of ``dy``.
        eps: of the norm.
    """
    y, backward, *_ = torch.func.vjp(lambda h: gelu_norm(h, None, None, eps), h)
    (dh,) = backward(dy)
    # The linear layer before adds its bias to each row, h = … + b  ⇒  db = Σ dh.
    return y, dh, dh.sum(0)
