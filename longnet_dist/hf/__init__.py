"""Hugging Face models with dilated attention.

Importing this package registers attention and mask under the name ``"dilated"`` in transformers, and lets a
configuration that uses them say so in config.json.
"""

from __future__ import annotations

from longnet_dist.extras import require_extra

require_extra("hf", "longnet_dist.hf")

from longnet_dist.hf.compact_cache import CompactCache  # noqa: E402
from longnet_dist.hf.dilation import dilate, pattern_of, register  # noqa: E402

register()

__all__ = ["CompactCache", "dilate", "pattern_of"]
