"""A LongNetConfig describes a model; some sizes have names."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from longnet_dist.config.block_style import BlockStyle
from longnet_dist.errors import ConfigError
from longnet_dist.geometry.attention_kinds import ATTENTION_KINDS, AttentionSettings
from longnet_dist.geometry.masked_pattern import MaskedPattern
from longnet_dist.geometry.pattern import DilatedPattern, check_heads
from longnet_dist.geometry.position_encodings import POSITION_ENCODINGS


def _size_of(name: str) -> float:
    """Return the parameters that a name like ``1.3b`` says; 0 for other names."""
    digits, unit = name[:-1], {"m": 1e6, "b": 1e9}.get(name[-1:])
    return float(digits) * unit if unit and digits.replace(".", "", 1).isdigit() else 0.0


_FILES = (file.name for file in (files("longnet_dist.config") / "models").iterdir())
MODEL_NAMES = tuple(
    sorted(
        (name.removesuffix(".yaml") for name in _FILES if name.endswith(".yaml")),
        key=lambda name: (_size_of(name), name),
    )
)
"""The named sizes, each a file in ``config/models``; the smallest first."""
HF_MODEL_TYPE = "longnet"
"""Value of ``model_type`` in the config.json of a LongNet for transformers."""


class LongNetConfig(BaseModel):
    """A LongNetConfig determines the shape and the mathematics of a :class:`~longnet_dist.LongNet`.

    ``LongNetConfig(name="125m", vocab_size=50257)`` is a named size with single fields replaced.

    Attributes:
        vocab_size: number of token ids ``V``; ids are ``0 … V-1``.
        dim: model dim ``E``.
        layers: number of blocks.
        heads: query heads ``H``; must divide ``dim``.
        kv_heads: key/value heads ``Hkv``, ``heads`` if not given; must divide ``heads``.
        ffn: kind of the feed-forward network: ``"plain"``, two linear layers with a GELU between them, or ``"gated"``,
            three of them, ``down(silu(gate x) · up x)`` (SwiGLU, arXiv 2002.05202). Both have a LayerNorm before the
            last linear layer.
        ffn_dim: inner dim of the feed-forward network, ``4·dim`` if not given. With the same, a gated network has half
            as many weights again.
        attention: what the layers run, a name of ``geometry/attention_kinds``: ``"dilated"``, or for comparison
            ``"full"``, ``"sparse"`` (the fixed pattern of arXiv 1904.10509) or ``"window"`` (sliding window). Branches,
            offsets and shifts are those of dilated attention.
        window: tokens that a token sees with ``attention="window"``, itself included.
        full_layers: numbers of layers that run full attention whatever ``attention`` is, counted from 0.
        segment_lengths: segment length ``w`` of each branch, tokens.
        dilation_rates: dilation rate ``r`` of each branch.
        head_offsets: name of a rule of ``geometry/offset_rules``, such as ``"modulo"`` (the paper) or ``"blocked"``
            (torchscale's checkpoints).
        layer_offsets: add the number of the layer to the offset of every head, modulo the rate, so that a head keeps
            other tokens in other layers.
        layer_shift: in odd layers all grids of segments begin at one common token, a third of the longest segment
            rounded down to a multiple of every rate, so that other tokens share a segment.
        causal: causal language model, in which a token sees itself and earlier tokens, or else bidirectional encoder.
        positions: name of an encoding of ``geometry/position_encodings``: ``"xpos"`` (default of causal models),
            ``"rope"`` (default of bidirectional ones) or ``"none"``. xPos scales a score down with the distance of the
            key behind the query. It would scale up keys ahead of the query, so it is for causal models only.
        xpos_base: tokens over which xPos decays by its factor; a larger value decays more slowly.
        rope_theta: base of the wavelengths of RoPE, also in xPos.
        sinks: give every query head a learned sink (:mod:`longnet_dist.attention.sink`): the logarithm of the weight of
            one more key, of value 0, so that a head can attend to nothing. They begin at 0.
        qk_norm: apply an RMSNorm to the query and the key of every head, before the positions.
        tie_embeddings: use the embedding as the output projection.
        norm_eps: epsilon of all norms.
        loss_chunk: tokens whose logits the loss computes at once; if not given, the largest power of two with at most
            2^27 logits.

    Raises:
        ConfigError: a field is unknown, has a wrong type, or does not fit the others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    vocab_size: PositiveInt = 256
    dim: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt | None = None
    ffn: Literal["plain", "gated"] = "plain"
    ffn_dim: PositiveInt | None = None
    attention: str = "dilated"
    window: PositiveInt = 2048
    full_layers: tuple[int, ...] = ()
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: str = "modulo"
    layer_offsets: bool = False
    layer_shift: bool = False
    causal: bool = True
    positions: str = "xpos"
    xpos_base: PositiveInt = 512
    rope_theta: float = 10000.0
    sinks: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    loss_chunk: PositiveInt | None = None

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_message(error, type(self).model_fields)) from None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, fields: Any) -> Any:
        """Put the fields of a named size under the given ones; positions follow from ``causal`` if not given."""
        if not isinstance(fields, dict):
            return fields
        fields = dict(fields)
        if (name := fields.pop("name", None)) is not None:
            fields = _named_fields(name) | fields
        if fields.get("causal") is False:
            fields.setdefault("positions", "rope")
        return fields

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_heads(self.heads, self.kv_heads or self.heads)
        if self.dim % self.heads:
            raise ConfigError(
                f"heads must divide dim, but dim={self.dim} and heads={self.heads}; make dim a multiple of heads"
            )
        POSITION_ENCODINGS.check(self.positions)
        encoding = POSITION_ENCODINGS[self.positions]
        if encoding.rotates and self.head_dim % 2:
            raise ConfigError(
                f"positions rotate pairs of channels, so dim/heads must be even, but dim={self.dim} and "
                f"heads={self.heads} give {self.head_dim}; use another number of heads, or positions=none"
            )
        self._check_direction()
        if self.rope_theta < 1 or self.norm_eps <= 0:
            raise ConfigError(
                f"rope_theta must be at least 1 and norm_eps above 0, not {self.rope_theta} and {self.norm_eps}"
            )
        self._check_attention()
        return self

    def _check_attention(self) -> None:
        """Refuse branches that cannot work, layers that are not there, and settings of another kind of attention."""
        ATTENTION_KINDS.check(self.attention)
        DilatedPattern(self.segment_lengths, self.dilation_rates, self.head_offsets)
        self.pattern  # noqa: B018 (raises if the kind does not fit the model)
        if self.attention != "dilated" and (self.layer_offsets or self.layer_shift):
            raise ConfigError(
                f"layer_offsets and layer_shift move the grids of dilated attention, but attention={self.attention}; "
                f"leave them out, or use attention=dilated"
            )
        if self.attention != "window" and self.window != type(self).model_fields["window"].default:
            raise ConfigError(
                f"window={self.window} belongs to attention=window, but attention={self.attention}; leave window out"
            )
        if self.sinks and self.needs_whole_sequences:
            raise ConfigError(
                f"sinks join the softmax of dilated and full attention, but attention={self.attention}; use "
                f"attention=dilated or full, or sinks=false"
            )
        layers = self.full_layers
        if len(set(layers)) < len(layers) or not all(0 <= layer < self.layers for layer in layers):
            raise ConfigError(
                f"full_layers are different numbers of layers from 0 to {self.layers - 1}, not {list(layers)}"
            )
        if layers and self.attention == "full":
            raise ConfigError("all layers run full attention with attention=full; leave full_layers out")

    def _check_direction(self) -> None:
        """Refuse positions that decay with the distance of earlier rows where a row sees later ones."""
        if POSITION_ENCODINGS[self.positions].scales and not self.causal:
            raise ConfigError(
                f"positions={self.positions} would weigh later rows up in a model with causal=false; use "
                f"positions=rope (or none)"
            )

    @property
    def pattern(self) -> DilatedPattern:
        """Return the pattern that all layers share unless ``full_layers`` or a field of layers says otherwise."""
        return self._pattern_of(self.attention)

    def _pattern_of(self, kind: str) -> DilatedPattern:
        branches = self.segment_lengths, self.dilation_rates, self.head_offsets
        return ATTENTION_KINDS[kind](AttentionSettings(*branches, self.window, self.causal))

    def layer_pattern(self, layer: int) -> DilatedPattern:
        """Return the pattern of a layer, counted from 0."""
        if layer in self.full_layers:
            return self._pattern_of("full")
        return self.pattern.of_layer(layer, self.layer_offsets, self.layer_shift)

    @property
    def pattern_counts(self) -> dict[DilatedPattern, int]:
        """Return the number of layers that have each pattern; it costs nothing for a model of any depth."""
        period = math.lcm(*self.dilation_rates) if self.layer_offsets else 1
        period = math.lcm(period, 2) if self.layer_shift else period
        found: Counter[DilatedPattern] = Counter()
        for layer in range(min(period, self.layers)):
            pattern = self.pattern.of_layer(layer, self.layer_offsets, self.layer_shift)
            full = sum(number % period == layer for number in self.full_layers)
            found[pattern] += -(-(self.layers - layer) // period) - full
        if self.full_layers:
            found[self._pattern_of("full")] += len(self.full_layers)
        return +found

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, also under the names that PEFT asks for when it merges adapters."""
        return self.model_dump() | {"model_type": "custom", "tie_word_embeddings": self.tie_embeddings}

    @property
    def needs_whole_sequences(self) -> bool:
        """Say whether a layer's attention computes a sequence only whole, on one device and as one document."""
        return any(isinstance(pattern, MaskedPattern) for pattern in self.pattern_counts)

    def style(self, layer: int) -> BlockStyle:
        """Return the style of block ``layer``."""
        return BlockStyle(gated=True, activation="silu") if self.ffn == "gated" else BlockStyle()

    @property
    def head_dim(self) -> int:
        """Return the head dim ``D = dim / heads``."""
        return self.dim // self.heads

    @property
    def query_dim(self) -> int:
        """Return the width of a token's queries over all heads, ``H · D``."""
        return self.heads * self.head_dim

    @property
    def key_dim(self) -> int:
        """Return the width of a token's keys over all heads, ``Hkv · D``; its values have the same."""
        return (self.kv_heads or self.heads) * self.head_dim

    @property
    def inner_dim(self) -> int:
        """Return the inner dim of the feed-forward network."""
        return self.ffn_dim or 4 * self.dim

    @property
    def first_dim(self) -> int:
        """Return the outputs of the feed-forward network's first linear layer, which may be gates too."""
        return self.inner_dim * (2 if self.ffn == "gated" else 1)

    @property
    def block_matrices(self) -> tuple[tuple[int, int], ...]:
        """Return the shapes of a block's matrices: queries, keys, values, output; the two of the feed-forward."""
        dim, kv, inner = self.dim, self.key_dim, self.inner_dim
        return (dim, dim), (kv, dim), (kv, dim), (dim, dim), (self.first_dim, dim), (dim, inner)

    @property
    def block_vectors(self) -> int:
        """Return the numbers in a block's biases, norms and sinks."""
        # Three norms of the model's width and one of the inner width, each with weight and bias.
        norms = 3 * 2 * self.dim + 2 * self.inner_dim + (2 * self.head_dim if self.qk_norm else 0)
        sinks = self.heads if self.sinks else 0
        return sum(rows for rows, _ in self.block_matrices) + norms + sinks

    @property
    def outer_vectors(self) -> int:
        """Return the numbers in the norm behind the last block."""
        return 2 * self.dim

    @property
    def logits_rows(self) -> int:
        """Return the number of tokens whose logits the loss computes at once.

        Unless ``loss_chunk`` is given, their logits take at most 512 MiB in float32.
        """
        # A power of two divides most sequence lengths, so that the loss is compiled for one shape only.
        return self.loss_chunk or 1 << max(0, (2**27 // self.vocab_size).bit_length() - 1)

    @property
    def num_outputs(self) -> int:
        """Return the ids that the head predicts; 0 without a head."""
        return self.vocab_size

    @property
    def mask_id(self) -> int | None:
        """Return the id of a masked token, ``vocab_size``, for a bidirectional model; None for a causal one."""
        return None if self.causal else self.vocab_size


def named_model(name: str, **fields: Any) -> LongNetConfig:
    """Return the configuration of a named size, with single fields replaced.

    Args:
        name: ``"paper"`` (LongNet, section 4.1), ``"125m"`` … ``"2.7b"`` (section 4.4), ``"8b"``
            (the shape of Qwen3-8B), or ``"tiny"`` for trials.
        fields: fields of :class:`LongNetConfig` to replace.

    Raises:
        ConfigError: there is no such size, or the fields do not fit together.
    """
    return LongNetConfig(name=name, **fields)


def own_fields(content: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that describe the model in the content of an exported folder's config.json.

    Args:
        content: all of it, or of a folder for transformers our fields among those of transformers.
    """
    if content.get("model_type") != HF_MODEL_TYPE:
        return content
    return {name: content[name] for name in LongNetConfig.model_fields if name in content}


def _named_fields(name: object) -> dict[str, Any]:
    if name not in MODEL_NAMES:
        raise ConfigError(f"model name must be one of {', '.join(MODEL_NAMES)}, not {name!r}")
    text = (files("longnet_dist.config") / "models" / f"{name}.yaml").read_text(encoding="utf-8")
    fields: dict[str, Any] = yaml.safe_load(text)
    return fields


def _message(error: ValidationError, known: Iterable[str]) -> str:
    """Write one line for each invalid field: its name, value and rule; ``known`` are the names of all fields."""
    lines = []
    for fault in error.errors():
        field = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, known, n=1, cutoff=0.0)[0]
            lines.append(f"a model has no field {field!r}; the nearest is {near!r}")
        elif fault["type"] == "missing":
            lines.append(f"a model needs {field!r}; give it, or the name of a size ({', '.join(MODEL_NAMES)})")
        elif "ctx" in fault and "error" in fault["ctx"]:
            lines.append(str(fault["ctx"]["error"]))
        else:
            lines.append(f"{field}={fault['input']!r}: {fault['msg']}")
    return "\n".join(lines)
