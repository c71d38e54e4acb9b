"""The configuration of a LongNet as transformers keeps it in config.json."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from longnet_dist.config import model as core
from longnet_dist.errors import ConfigError

FIELDS = tuple(core.LongNetConfig.model_fields)
"""Names of the fields that determine the model."""
_HF_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "ffn_dim",
    "layer_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


class LongNetConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configure a causal LongNet for transformers: the fields of :class:`longnet_dist.LongNetConfig`, and some more.

    ``LongNetConfig(name="125m", vocab_size=50257)`` is a named size with single fields replaced. The names that
    transformers uses (``hidden_size``, ``num_hidden_layers``, …) are read and written too.

    Args:
        max_position_embeddings: longest text that other programs should give to the model, tokens; no limit of the
            model itself. If not given, the longest segment.
        use_cache: whether ``generate`` keeps a cache.
        fields: of :class:`longnet_dist.LongNetConfig`, and what every configuration of transformers has.

    Raises:
        ConfigError: a field is missing or wrong, two names give one field different values, or ``causal`` is false.
    """

    model_type = core.HF_MODEL_TYPE
    attribute_map = _HF_NAMES
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012 (transformers adds lists to it)
    has_no_defaults_at_init = True

    def __init__(self, max_position_embeddings: int | None = None, use_cache: bool = True, **fields: Any) -> None:
        for theirs, ours in _HF_NAMES.items():
            if theirs in fields:
                value = fields.pop(theirs)
                if fields.setdefault(ours, value) != value:
                    raise ConfigError(f"{theirs}={value} and {ours}={fields[ours]} are one field; give one of them")
        given = {name: fields.pop(name) for name in ("name", *FIELDS) if name in fields}
        config = core.LongNetConfig(**given)
        if not config.causal:
            raise ConfigError(
                "a LongNetForCausalLM is causal, but causal=false; use longnet_dist.LongNet for a bidirectional model"
            )
        special = {name: fields.pop(name, None) for name in _SPECIAL_IDS}
        super().__init__(**fields)
        resolved = {"kv_heads": config.kv_heads or config.heads, "ffn_dim": config.inner_dim}
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in config.model_dump().items()}
        for name, value in (own | resolved | special).items():
            setattr(self, name, value)
        self.max_position_embeddings = max_position_embeddings or max(config.segment_lengths)
        self.use_cache = use_cache

    def core_config(self) -> core.LongNetConfig:
        """Return the configuration of the wrapped :class:`longnet_dist.LongNet`.

        Raises:
            ConfigError: a field was set to a value that does not fit the others.
        """
        return core.LongNetConfig(**{name: getattr(self, name) for name in FIELDS})

    @property
    def head_dim(self) -> int:
        """Return the head dim ``D = dim / heads``."""
        return int(self.dim // self.heads)
