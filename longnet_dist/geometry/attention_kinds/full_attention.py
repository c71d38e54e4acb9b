"""Full attention: every token sees all tokens, or all earlier ones."""

from __future__ import annotations

from longnet_dist.geometry.attention_kinds import ATTENTION_KINDS, AttentionSettings
from longnet_dist.geometry.masked_pattern import ALL_ROWS
from longnet_dist.geometry.pattern import DilatedPattern


@ATTENTION_KINDS.register("full")
def full(settings: AttentionSettings) -> DilatedPattern:
    """Return one branch of one segment that no sequence exceeds, with r = 1, for the kernels of dilated attention."""
    return DilatedPattern([ALL_ROWS], [1])
