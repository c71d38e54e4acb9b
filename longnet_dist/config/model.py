"""The configuration of a model, and the sizes that have a name."""

from __future__ import annotations

import difflib
from importlib.resources import files
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from longnet_dist.errors import ConfigError
from longnet_dist.geometry.pattern import DilatedPattern, check_heads

MODEL_NAMES = ("tiny", "paper", "125m", "350m", "760m", "1.3b", "2.7b")


class LongNetConfig(BaseModel):
    """All that determines the shape and the mathematics of a :class:`~longnet_dist.LongNet`.

    ``LongNetConfig(name="125m", vocab_size=50257)`` takes a named size and replaces single fields.

    Attributes:
        vocab_size: number of token ids ``V``; ids are ``0 … V-1``.
        dim: model dim ``E``.
        layers: number of blocks.
        heads: query heads ``H``; must divide ``dim``.
        kv_heads: key/value heads ``Hkv``, ``heads`` if not given; must divide ``heads``.
        ffn_dim: inner dim of the feed-forward network, ``4·dim`` if not given.
        segment_lengths: ``w`` of each branch, rows.
        dilation_rates: ``r`` of each branch.
        head_offsets: ``"modulo"`` (the paper) or ``"blocked"`` (torchscale's checkpoints).
        causal: language model (each row sees itself and earlier rows) or bidirectional encoder.
        positions: ``"xpos"`` (the default of causal models), ``"rope"`` (of bidirectional ones) or ``"none"``. xPos
            weighs a key down with its distance behind the query, so ahead of it it would weigh it up: causal only.
        xpos_base: rows over which xPos decays by its factor; larger is slower.
        rope_theta: base of the wavelengths of the rotation, xPos's too.
        qk_norm: RMSNorm of every head's query and key before the positions.
        tie_embeddings: whether the output projection is the embedding.
        norm_eps: epsilon of all norms.
        loss_chunk: rows of logits that the loss holds at once; if not given, the largest power of two that has at most
            2^27 logits.

    Raises:
        ConfigError: an unknown field, a wrong type, or fields that do not fit together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    vocab_size: PositiveInt = 256
    dim: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt | None = None
    ffn_dim: PositiveInt | None = None
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: Literal["modulo", "blocked"] = "modulo"
    causal: bool = True
    positions: Literal["xpos", "rope", "none"] = "xpos"
    xpos_base: PositiveInt = 512
    rope_theta: float = 10000.0
    qk_norm: bool = False
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    loss_chunk: PositiveInt | None = None

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_message(error)) from None

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
        if self.positions != "none" and self.head_dim % 2:
            raise ConfigError(
                f"positions rotate pairs of channels, so dim/heads must be even, but dim={self.dim} and "
                f"heads={self.heads} give {self.head_dim}; use another number of heads, or positions=none"
            )
        if self.positions == "xpos" and not self.causal:
            raise ConfigError(
                "positions=xpos would weigh later rows up in a model with causal=false; use positions=rope (or none)"
            )
        if self.rope_theta < 1 or self.norm_eps <= 0:
            raise ConfigError(
                f"rope_theta must be at least 1 and norm_eps above 0, not {self.rope_theta} and {self.norm_eps}"
            )
        self.pattern  # noqa: B018 (raises if the branches cannot work)
        return self

    @property
    def pattern(self) -> DilatedPattern:
        """The branches of every layer."""
        return DilatedPattern(self.segment_lengths, self.dilation_rates, self.head_offsets)

    @property
    def head_dim(self) -> int:
        """``D``."""
        return self.dim // self.heads

    @property
    def logits_rows(self) -> int:
        """Rows of logits that the loss holds at once: 512 MiB in float32 unless ``loss_chunk`` says otherwise.

        A power of two divides most lengths, so that the compiled loss has one shape.
        """
        return self.loss_chunk or 1 << max(0, (2**27 // self.vocab_size).bit_length() - 1)

    @property
    def mask_id(self) -> int | None:
        """The extra input id of a bidirectional model, ``vocab_size``; None for a causal one."""
        return None if self.causal else self.vocab_size


def named_model(name: str, **fields: Any) -> LongNetConfig:
    """The configuration of a named size, with ``fields`` in place of its own.

    Args:
        name: ``"paper"`` (LongNet, section 4.1), ``"125m"`` … ``"2.7b"`` (section 4.4), or ``"tiny"`` for trials.

    Raises:
        ConfigError: no such size, or fields that do not fit.
    """
    return LongNetConfig(name=name, **fields)


def _named_fields(name: object) -> dict[str, Any]:
    if name not in MODEL_NAMES:
        raise ConfigError(f"model name must be one of {', '.join(MODEL_NAMES)}, not {name!r}")
    text = (files("longnet_dist.config") / "models" / f"{name}.yaml").read_text(encoding="utf-8")
    fields: dict[str, Any] = yaml.safe_load(text)
    return fields


def _message(error: ValidationError) -> str:
    """One line for each fault of a model's fields: field, value and rule."""
    lines = []
    for fault in error.errors():
        field = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, LongNetConfig.model_fields, n=1, cutoff=0.0)[0]
            lines.append(f"a model has no field {field!r}; the nearest is {near!r}")
        elif fault["type"] == "missing":
            lines.append(f"a model needs {field!r}; give it, or the name of a size ({', '.join(MODEL_NAMES)})")
        elif "ctx" in fault and "error" in fault["ctx"]:
            lines.append(str(fault["ctx"]["error"]))
        else:
            lines.append(f"{field}={fault['input']!r}: {fault['msg']}")
    return "\n".join(lines)
