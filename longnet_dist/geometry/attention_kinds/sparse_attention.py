"""The fixed pattern of the Sparse Transformer (arXiv 1904.10509)."""

from __future__ import annotations

from longnet_dist.errors import ConfigError
from longnet_dist.geometry.attention_kinds import ATTENTION_KINDS, AttentionSettings
from longnet_dist.geometry.masked_pattern import FixedPattern


@ATTENTION_KINDS.register("sparse")
def sparse(settings: AttentionSettings) -> FixedPattern:
    """Return the pattern; its blocks follow from the length of a sequence.

    Raises:
        ConfigError: the model is bidirectional.
    """
    if not settings.causal:
        raise ConfigError(
            "attention=sparse is the fixed pattern of arXiv 1904.10509, in which a token sees columns of earlier "
            "blocks, but causal is false; use causal=true, or attention=dilated, full or window"
        )
    return FixedPattern()
