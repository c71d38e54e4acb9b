"""Kinds of attention that a layer can run (``model.attention``), each in a file of its own.

A kind registers a function under its name, which makes the pattern of a layer from the settings of a model. It is a
:class:`~longnet_dist.geometry.pattern.DilatedPattern`, which all kernels compute, or a
:class:`~longnet_dist.geometry.masked_pattern.MaskedPattern`, which FlexAttention computes on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.registry import Registry


class AttentionSettings(NamedTuple):
    """Hold the settings of a model that decide which tokens see which.

    Attributes:
        segment_lengths, dilation_rates, head_offsets: of the branches of dilated attention.
        window: tokens that a token sees in sliding-window attention, itself included.
        causal: whether a token sees only itself and earlier tokens.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: str
    window: int
    causal: bool


ATTENTION_KINDS: Registry[Callable[[AttentionSettings], DilatedPattern]] = Registry("attention", __name__, "_attention")
