"""How a Hugging Face model or configuration gets its pattern, and keeps it in config.json."""

from __future__ import annotations

from functools import wraps
from typing import Any, TypeVar

from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from longnet_dist.config.hf_model import PATTERN_FIELD, check_full_attention
from longnet_dist.config.model import HF_MODEL_TYPE
from longnet_dist.errors import ConfigError
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.hf.interface import dilated_forward, dilated_mask
from longnet_dist.hf.pattern_field import NAME, pattern_of
from longnet_dist.private_interfaces import attention_of, set_attention, takes_attention

Dilated = TypeVar("Dilated")
_PATCHED = "writes_dilated_attention"


def dilate(model_or_config: Dilated, pattern: DilatedPattern) -> Dilated:
    """Give a Hugging Face model, or a configuration, dilated attention in all layers; return it.

    ::

        model = dilate(AutoModelForCausalLM.from_pretrained("model"), DilatedPattern.geometric(2048, 262144))

    The pattern and the implementation are saved in config.json. Loading such a model needs ``import longnet_dist.hf``;
    without it transformers raises an error.

    Args:
        model_or_config: of a decoder or an encoder, such as Llama, Qwen3, Mistral, gpt-oss, BERT, ModernBERT.
        pattern: the branches.

    Raises:
        ConfigError: the model has sliding windows, soft caps, or cross-attention, or computes attention by itself, so
            that it would stay as it is.
    """
    model = model_or_config if not isinstance(model_or_config, PreTrainedConfig) else None
    config = model_or_config if model is None else getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ConfigError(
            f"dilate takes a model or configuration of transformers, not {type(model_or_config).__name__}"
        )
    if not isinstance(pattern, DilatedPattern):
        raise ConfigError(f"the pattern must be a DilatedPattern, not {type(pattern).__name__}")
    text = config.get_text_config()
    check_full_attention(text)
    _check_interface(model, text)
    setattr(text, PATTERN_FIELD, _fields(pattern))
    if isinstance(model, PreTrainedModel) or hasattr(model, "set_attn_implementation"):
        key = next((name for name in config.sub_configs if getattr(config, name, None) is text), None)
        model.set_attn_implementation(NAME if key is None else {key: NAME})  # type: ignore[union-attr]
    else:
        set_attention(text, NAME)
    return model_or_config


def _check_interface(model: Any, text: PreTrainedConfig) -> None:
    """Refuse a model that would not call the attention, without a word, as BLOOM, Falcon and DeBERTa."""
    if text.model_type == HF_MODEL_TYPE:
        raise ConfigError(
            "a LongNet has its pattern in its own configuration; set segment_lengths and dilation_rates there, not by "
            "dilate"
        )
    kind = type(model) if isinstance(model, PreTrainedModel) else MODEL_MAPPING.get(type(text), None)
    if isinstance(kind, type) and not takes_attention(kind):
        raise ConfigError(
            f"dilated attention is called through the AttentionInterface of transformers, but {kind.__name__} computes "
            f"its attention by itself; use a model such as Llama, Qwen3, Mistral, gpt-oss, BERT or ModernBERT"
        )


def register() -> None:
    """Register attention and mask, and let configurations write the name of the implementation."""
    AttentionInterface.register(NAME, dilated_forward)
    AttentionMaskInterface.register(NAME, dilated_mask)
    _write_implementation()


def _write_implementation() -> None:
    # transformers leaves the implementation out of config.json, so that a saved model would come back dense. It reads
    # the key attn_implementation, and refuses a name that is not registered.
    original = PreTrainedConfig.to_dict
    if hasattr(original, _PATCHED):
        return

    @wraps(original)
    def to_dict(self: PreTrainedConfig) -> dict[str, Any]:
        fields: dict[str, Any] = original(self)
        if attention_of(self) == NAME and hasattr(self, PATTERN_FIELD):
            fields["attn_implementation"] = NAME
        return fields

    setattr(to_dict, _PATCHED, True)
    PreTrainedConfig.to_dict = to_dict  # type: ignore[method-assign]


def _fields(pattern: DilatedPattern) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "segment_lengths": list(pattern.segment_lengths),
        "dilation_rates": list(pattern.dilation_rates),
        "head_offsets": pattern.head_offsets,
    }
    if shift := getattr(pattern, "shift", None):
        fields["shift"] = list(shift)
    return fields


__all__ = ["dilate", "pattern_of", "register"]
