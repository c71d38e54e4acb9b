"""Sliding-window attention: a token sees its nearest neighbours."""

from __future__ import annotations

from longnet_dist.geometry.attention_kinds import ATTENTION_KINDS, AttentionSettings
from longnet_dist.geometry.masked_pattern import WindowPattern


@ATTENTION_KINDS.register("window")
def window(settings: AttentionSettings) -> WindowPattern:
    """Return the pattern of the model's window."""
    return WindowPattern(settings.window)
