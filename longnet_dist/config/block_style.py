"""A BlockStyle says how a block differs from LongNet's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["gelu", "relu", "silu"]


@dataclass(frozen=True)
class BlockStyle:
    """A BlockStyle determines the mathematics of a block; the default is LongNet's own block.

    Attributes:
        pre_norm: LayerNorm before each sub-layer; else behind each residual sum.
        sub_norm: LayerNorm inside each sub-layer as well (MAGNETO, arXiv 2210.06423).
        residual_scale: factor α of the residual (DeepNorm, arXiv 2203.00555).
        gain: of the initial value, output and feed-forward weights; None: MAGNETO's.
        gated: the feed-forward network multiplies the activation of one half of its first linear layer's outputs by the
            other half.
        activation: of the feed-forward network.
        activation_float32: compute the activation in float32 whatever the dtype, as torchscale does.
        dropout: probability behind the output projection and the feed-forward network, in training.
        activation_dropout: probability behind the activation, in training.
        drop_path: probability that a sub-layer is left out for a whole sequence, in training (stochastic depth).
    """

    pre_norm: bool = True
    sub_norm: bool = True
    residual_scale: float = 1.0
    gain: float | None = None
    gated: bool = False
    activation: Activation = "gelu"
    activation_float32: bool = False
    dropout: float = 0.0
    activation_dropout: float = 0.0
    drop_path: float = 0.0
