"""Hugging Face models with dilated attention.

Importing this package registers attention and mask under the name ``"dilated"`` in transformers, and lets a
configuration that uses them say so in config.json. It registers our own models for the Auto classes, too.
"""

from __future__ import annotations

from longnet_dist.extras import require_extra

require_extra("hf", "longnet_dist.hf")

from longnet_dist.hf.causal_lm.auto_classes import register_longnet  # noqa: E402
from longnet_dist.hf.causal_lm.generation_cache import LongNetCache  # noqa: E402
from longnet_dist.hf.causal_lm.hf_config import LongNetConfig  # noqa: E402
from longnet_dist.hf.causal_lm.modeling import LongNetForCausalLM  # noqa: E402
from longnet_dist.hf.compact_cache import CompactCache  # noqa: E402
from longnet_dist.hf.dilation import dilate, pattern_of, register  # noqa: E402
from longnet_dist.hf.finished_model import set_trained_length, write_model_card  # noqa: E402
from longnet_dist.hf.parallel.dealing import parallelism_config  # noqa: E402
from longnet_dist.hf.parallel.group_model import sequence_parallel  # noqa: E402

register()
register_longnet()

__all__ = [
    "CompactCache",
    "LongNetCache",
    "LongNetConfig",
    "LongNetForCausalLM",
    "dilate",
    "parallelism_config",
    "pattern_of",
    "sequence_parallel",
    "set_trained_length",
    "write_model_card",
]
