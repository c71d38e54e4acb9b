"""The pattern of a Hugging Face configuration."""

from __future__ import annotations

import inspect
from typing import Any

from longnet_dist.config.hf_model import PATTERN_FIELD
from longnet_dist.errors import ConfigError
from longnet_dist.geometry.pattern import DilatedPattern

NAME = "dilated"
"""Under which attention and mask are registered."""


def pattern_of(config: Any) -> DilatedPattern:
    """Return the pattern that :func:`longnet_dist.hf.dilate` has given to a configuration.

    Raises:
        ConfigError: it has none.
    """
    fields = getattr(config, PATTERN_FIELD, None)
    if not isinstance(fields, dict):
        raise ConfigError(
            f"attn_implementation={NAME!r} needs a pattern, but the configuration has none; call "
            f"longnet_dist.hf.dilate(model, pattern)"
        )
    known = inspect.signature(DilatedPattern).parameters
    missing = [name for name in ("segment_lengths", "dilation_rates") if name not in fields]
    if missing or (unknown := sorted(fields.keys() - known.keys())):
        what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)} too"
        raise ConfigError(
            f"{PATTERN_FIELD} of config.json has the arguments {', '.join(known)} of a DilatedPattern, but {what}; "
            f"call longnet_dist.hf.dilate(model, pattern)"
        )
    return DilatedPattern(**fields)
