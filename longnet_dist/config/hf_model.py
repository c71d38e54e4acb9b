"""A HuggingFaceConfig describes a decoder of transformers that a run trains with dilated attention."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import PositiveInt, model_serializer, model_validator

from longnet_dist.config.model import LongNetConfig
from longnet_dist.errors import ConfigError
from longnet_dist.extras import require_extra
from longnet_dist.geometry.pattern import DilatedPattern, check_heads

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` that a run can train."""
CONFIG_FILE = "config.json"
PATTERN_FIELD = "dilated_pattern"
"""Field of a configuration of transformers with the arguments of its pattern."""
_OWN = ("path", "config", "weights", "segment_lengths", "dilation_rates", "head_offsets", "loss_chunk")
# What says where and by what a configuration was written, and how attention is computed; a run has its own.
_LEFT_OUT = ("transformers_version", "_name_or_path", "attn_implementation", "auto_map", PATTERN_FIELD)
_SOFT_CAPS = ("attn_logit_softcapping", "attn_logit_softcap")
_ROPE_OF_TEXT = ("dynamic", "longrope")


class HuggingFaceConfig(LongNetConfig):
    """A HuggingFaceConfig is the section ``model`` of a run that trains a model of transformers.

    It gives its sizes under the names of :class:`~longnet_dist.LongNetConfig`, which come from config.json and cannot
    be set. The pattern of all layers can.

    Attributes:
        path: a folder with config.json and perhaps weights (``*.safetensors``), or a config.json. With a config.json,
            or without weights, the weights are drawn from ``train.seed``.
        config: the content of config.json; a run stores it, so that its folder describes the model alone.
        weights: SHA-256 of the weights that the run began with; a run stores it. None: they were drawn.
        segment_lengths: segment length ``w`` of each branch, tokens; if not given, those of config.json's
            ``dilated_pattern``.
        dilation_rates: dilation rate ``r`` of each branch.
        head_offsets: name of a rule of ``geometry/offset_rules``.
        loss_chunk: tokens whose logits the loss computes at once.

    Raises:
        ConfigError: there is no such model here, its family or a part of it cannot be trained, a size is given beside
            it, or there is no pattern.
        MissingExtraError: transformers is not installed.
    """

    path: Path | None = None
    config: dict[str, Any]
    weights: str | None = None
    loss_chunk: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, fields: Any) -> Any:
        """Fill in config.json and the sizes that follow from it."""
        require_extra("hf", "model.path", only="transformers")
        given = [f"model.{name}={fields[name]!r}" for name in fields if name not in _OWN]
        if given:
            raise ConfigError(
                f"model.path={fields.get('path')} brings the sizes of its model, but {', '.join(given)} is given too; "
                f"beside model.path only model.{', model.'.join(_OWN[3:])} can be set: leave the others out"
            )
        path = fields.get("path")
        content = read_model_config(path) if fields.get("config") is None else fields["config"]
        fields = {name: value for name, value in fields.items() if value is not None}
        return sizes_of(content) | _pattern_fields(content, path, fields) | fields | {"config": _kept(content)}

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_heads(self.heads, self.kv_heads or self.heads)
        DilatedPattern(self.segment_lengths, self.dilation_rates, self.head_offsets)
        _check_trainable(self.transformers)
        return self

    @model_serializer(mode="plain")
    def _own_fields(self) -> dict[str, Any]:
        """Return the fields that can be set: the sizes follow from ``config``."""
        values = {name: getattr(self, name) for name in _OWN}
        return values | {"path": None if self.path is None else str(self.path)}

    @cached_property
    def transformers(self) -> PreTrainedConfig:
        """Return the configuration of transformers, without a pattern; nobody may change it."""
        return self.fresh_transformers()

    def fresh_transformers(self) -> PreTrainedConfig:
        """Return a configuration of transformers that the caller may change."""
        fields: PreTrainedConfig = _parsed(self.config)
        return fields

    @property
    def head_dim(self) -> int:
        """Return the head dim ``D``, which need not be ``dim / heads``."""
        return _head_dim(self.transformers)

    @property
    def block_matrices(self) -> tuple[tuple[int, int], ...]:
        """Return the shapes of a block's matrices: queries, keys, values, output; gate, up, down."""
        q, kv, inner = self.query_dim, self.key_dim, self.inner_dim
        feed_forward = (inner, self.dim), (inner, self.dim), (self.dim, inner)
        return (q, self.dim), (kv, self.dim), (kv, self.dim), (self.dim, q), *feed_forward

    @property
    def block_vectors(self) -> int:
        """Return the numbers in a block's norms and biases."""
        fields, rows = self.transformers, [out for out, _ in self.block_matrices]
        biased = {"qwen2": 3}.get(fields.model_type, 4 if getattr(fields, "attention_bias", False) else 0)
        biases = sum(rows[:biased]) + (sum(rows[4:]) if getattr(fields, "mlp_bias", False) else 0)
        return 2 * self.dim + biases + (2 * self.head_dim if fields.model_type == "qwen3" else 0)

    @property
    def outer_vectors(self) -> int:
        """Return the numbers in the norm behind the last block."""
        return self.dim


def read_model_config(path: Any) -> dict[str, Any]:
    """Return the content of the config.json that ``model.path`` means.

    Args:
        path: a folder or a file.

    Raises:
        ConfigError: there is none, or it is no JSON object.
    """
    file = Path(os.path.expanduser(str(path)))
    file = file / CONFIG_FILE if file.is_dir() else file
    if not file.is_file():
        raise ConfigError(
            f"model.path={path} must be a folder of this machine with a {CONFIG_FILE}, or such a file, but there is no "
            f"{file}; nothing is downloaded: fetch the model first (hf download NAME --local-dir FOLDER), then give "
            f"the folder"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model.path={path}: cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"model.path={path}: {file} must be a JSON object, not {type(content).__name__}")
    return content


def sizes_of(content: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes of a model under the names of :class:`~longnet_dist.LongNetConfig`.

    Args:
        content: of its config.json.

    Raises:
        ConfigError: it is of a family that a run cannot train, or transformers refuses it.
    """
    family = content.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"model.path trains decoders with model_type {', '.join(FAMILIES)}, but the model has model_type="
            f"{family!r}; longnet_dist.hf.dilate and transformers' own Trainer take others"
        )
    fields = _parsed(content)
    return {
        "vocab_size": fields.vocab_size,
        "dim": fields.hidden_size,
        "layers": fields.num_hidden_layers,
        "heads": fields.num_attention_heads,
        "kv_heads": fields.num_key_value_heads,
        "ffn_dim": fields.intermediate_size,
        "tie_embeddings": fields.tie_word_embeddings,
        "norm_eps": fields.rms_norm_eps,
        "ffn": "gated",
        "positions": "none",  # transformers rotates queries and keys
    }


def check_full_attention(config: Any) -> None:
    """Refuse a configuration of transformers whose attention dilated attention cannot take the place of.

    Args:
        config: of transformers, of one text model.

    Raises:
        ConfigError: it has sliding windows or other kinds of layers, soft caps, or cross-attention.
    """
    types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if types - {"full_attention"} or (window is not None and not types):
        found = ", ".join(sorted(types - {"full_attention"})) or f"sliding_window={window}"
        raise ConfigError(
            f"dilated attention takes the place of full attention, but the model has windows or other layers "
            f"({found}); use a configuration in which every layer has full attention"
        )
    for name in _SOFT_CAPS:
        if getattr(config, name, None) is not None:
            raise ConfigError(f"dilated attention has no soft cap, but {name}={getattr(config, name)}")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ConfigError("dilated attention has no cross-attention, but the model is an encoder-decoder")


def _parsed(content: dict[str, Any]) -> Any:
    """Return the configuration of transformers for the content of a config.json."""
    from transformers import AutoConfig

    fields = _kept(content)
    try:
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:  # transformers and its validators raise many kinds
        raise ConfigError(f"transformers refuses the model's {CONFIG_FILE}: {error}") from None


def _kept(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in _LEFT_OUT}


def _pattern_fields(content: dict[str, Any], path: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the pattern that config.json has, where none is given."""
    given = [name for name in ("segment_lengths", "dilation_rates") if name in fields]
    if len(given) == 2:
        return {}
    own = content.get(PATTERN_FIELD)
    parts = own if isinstance(own, dict) else {}
    lacking = [name for name in ("segment_lengths", "dilation_rates") if name not in parts]
    if given or lacking or any(parts.get("shift") or ()):
        its = f"has a {PATTERN_FIELD} without {', '.join(lacking)}" if lacking else "has a pattern with shifts"
        what = f"has model.{given[0]} alone" if given else its if own else "has no pattern"
        raise ConfigError(
            f"model.path={path} needs a pattern without shifts, but {what}; give model.segment_lengths and "
            f"model.dilation_rates, such as model.segment_lengths=[2048,8192] model.dilation_rates=[1,4]"
        )
    return {name: parts[name] for name in ("segment_lengths", "dilation_rates", "head_offsets") if name in parts}


def _head_dim(fields: Any) -> int:
    size: int = getattr(fields, "head_dim", None) or fields.hidden_size // fields.num_attention_heads
    return size


def _check_trainable(fields: Any) -> None:
    """Refuse what a run would compute otherwise than transformers, or not the same on all ranks."""
    check_full_attention(fields)
    if getattr(fields, "quantization_config", None) is not None:
        raise ConfigError("a run trains weights in full precision, but the model has a quantization_config; use its "
                          "unquantized weights")  # fmt: skip
    if dropout := getattr(fields, "attention_dropout", 0):
        raise ConfigError(
            f"dilated attention has no dropout of attention weights, but config.json has attention_dropout={dropout}; "
            f"set it to 0"
        )
    kind = (getattr(fields, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in _ROPE_OF_TEXT:
        raise ConfigError(
            f"ranks hold parts of a text, but rope_type={kind} changes the rotations with the length of the text at "
            f"hand; use rope_type default, linear, llama3 or yarn"
        )
