"""Dilated attention (LongNet, section 2.2)."""

from __future__ import annotations

from longnet_dist.geometry.attention_kinds import ATTENTION_KINDS, AttentionSettings
from longnet_dist.geometry.pattern import DilatedPattern


@ATTENTION_KINDS.register("dilated")
def dilated(settings: AttentionSettings) -> DilatedPattern:
    """Return the branches of the model."""
    return DilatedPattern(settings.segment_lengths, settings.dilation_rates, settings.head_offsets)
