"""An EncoderConfig describes an encoder of features or tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from longnet_dist.config.block_style import Activation, BlockStyle
from longnet_dist.config.model import LongNetConfig
from longnet_dist.errors import ConfigError

Probability = Annotated[float, Field(ge=0, lt=1)]


class EncoderConfig(LongNetConfig):
    """An EncoderConfig determines the shape and the mathematics of a :class:`~longnet_dist.LongNetEncoder`.

    It has the fields of :class:`~longnet_dist.LongNetConfig`, with other defaults for a few, and those below. The
    default block is LongNet's own.

    Attributes:
        kind: tells the configuration of an encoder from that of a language model.
        feature_dim: channels ``F`` of the features, which a linear layer takes to ``dim``; None: features have ``dim``
            channels and are taken as they are.
        vocab_size: rows of the token embedding; None: the encoder takes features alone.
        outputs: ids that the head predicts; None: there is no head.
        causal: whether a token sees only itself and earlier ones; default false.
        positions: encoding of queries and keys; default ``"none"``.
        scale_embedding: multiply embeddings, or features, by the root of ``dim``.
        position_embedding: what is added to a row: ``"learned"`` (a vector for each place in the sequence),
            ``"sincos"`` (sines and cosines of its coordinates, computed), or ``"none"``.
        max_positions: number of learned vectors.
        position_offset: number of the vector of the first row.
        coordinates: coordinates of a row: 1, 2 or 3. With 1 they may be left out: rows are counted then.
        tile_size: side of a tile, in the unit of the coordinates, which are counted in whole tiles; None: taken as they
            are.
        embedding_norm: LayerNorm of the embedded rows, positions included.
        cls_token: put a learned row before each sequence.
        pool: what a sequence is summarized by: its ``"cls"`` row, the ``"mean"`` of the other rows, or ``"none"``.
        pool_norm_eps: epsilon of a LayerNorm behind the pool; None: no such norm.
        pre_norm: LayerNorm before each sub-layer; else behind each residual sum.
        sub_norm: LayerNorm inside each sub-layer.
        final_norm: LayerNorm behind the last block.
        deepnorm: residuals are multiplied by ``(2·layers)^(1/4)`` (DeepNorm, arXiv 2203.00555).
        activation: ``"gelu"``, ``"relu"`` or ``"silu"``; the default is ``"silu"`` with ``ffn="gated"``.
        activation_float32: compute the activation in float32 whatever the dtype, as torchscale does.
        dropout: probability behind the embedding and behind both sub-layers, in training.
        activation_dropout: probability behind the activation, in training.
        attention_dropout: refused above 0, since exact attention never has its weights.
        drop_path: probability that the last block's sub-layers are left out for a sequence, in training; it grows from
            0 at the first block (stochastic depth).
        phantom_keys: attend to torchscale's zero keys (:func:`~longnet_dist.phantom_keys`), for its checkpoints.

    Raises:
        ConfigError: a field is unknown, has a wrong type, or does not fit the others.
    """

    kind: Literal["encoder"] = "encoder"
    feature_dim: PositiveInt | None = None
    vocab_size: PositiveInt | None = None  # type: ignore[assignment]
    outputs: PositiveInt | None = None
    causal: bool = False
    positions: str = "none"
    scale_embedding: bool = False
    position_embedding: Literal["none", "learned", "sincos"] = "none"
    max_positions: PositiveInt | None = None
    position_offset: NonNegativeInt = 0
    coordinates: Literal[1, 2, 3] = 1
    tile_size: Annotated[float, Field(gt=0)] | None = None
    embedding_norm: bool = False
    cls_token: bool = False
    pool: Literal["none", "cls", "mean"] = "none"
    pool_norm_eps: Annotated[float, Field(gt=0)] | None = None
    pre_norm: bool = True
    sub_norm: bool = True
    final_norm: bool = True
    deepnorm: bool = False
    activation: Activation = "gelu"
    activation_float32: bool = False
    dropout: Probability = 0.0
    activation_dropout: Probability = 0.0
    attention_dropout: Probability = 0.0
    drop_path: Probability = 0.0
    phantom_keys: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, fields: Any) -> Any:
        """Let the activation follow from ``ffn`` if not given; positions have a default of the class."""
        if isinstance(fields, dict) and fields.get("ffn") == "gated":
            return {"activation": "silu"} | fields
        return fields

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        if self.attention_dropout:
            raise ConfigError(
                f"attention_dropout is not supported, because exact attention never has its weights, but is "
                f"{self.attention_dropout}; use attention_dropout=0 (in evaluation it does nothing)"
            )
        if self.vocab_size is None and self.tie_embeddings:
            raise ConfigError("tie_embeddings=true shares the token embedding, but vocab_size is not given; give it")
        if self.tie_embeddings and (self.outputs is None or self.outputs > (self.vocab_size or 0)):
            raise ConfigError(
                f"a tied head has at most as many outputs as the embedding has rows, but outputs={self.outputs} and "
                f"vocab_size={self.vocab_size}; give outputs, or tie_embeddings=false"
            )
        if self.vocab_size is not None and self.feature_dim is not None:
            raise ConfigError(
                f"an encoder takes tokens or features of its own, but vocab_size={self.vocab_size} and "
                f"feature_dim={self.feature_dim}; give one of them"
            )
        self._check_sequences()
        return self

    def _check_sequences(self) -> None:
        if (self.position_embedding == "learned") != (self.max_positions is not None):
            raise ConfigError(
                f"max_positions is the number of learned vectors, but position_embedding={self.position_embedding} and "
                f"max_positions={self.max_positions}; give both or neither"
            )
        if self.position_embedding == "sincos" and self.dim < 2 * self.coordinates:
            raise ConfigError(
                f"every coordinate needs two channels, but dim={self.dim} and coordinates={self.coordinates}; use a "
                f"larger dim"
            )
        if self.pool == "cls" and not self.cls_token:
            raise ConfigError("pool=cls takes the cls row, but cls_token=false; use cls_token=true, or pool=mean")
        if self.phantom_keys and self.causal:
            raise ConfigError("causal models have no phantom keys; use phantom_keys=false")
        if self.phantom_keys and (self.attention != "dilated" or self.full_layers):
            raise ConfigError("phantom keys fill the grids of dilated attention; use attention=dilated in all layers")
        if self.phantom_keys and self.sinks:
            raise ConfigError("phantom keys are sinks of their own; use sinks=false, or no phantom_keys")
        if self.phantom_keys and self.layer_shift:
            raise ConfigError("phantom keys fill grids that begin at row 0; use layer_shift=false, or no phantom_keys")

    def _check_direction(self) -> None:
        """Allow positions that decay in a bidirectional encoder, since torchscale has trained such."""

    @property
    def logits_rows(self) -> int:
        """Return the number of tokens whose logits the loss computes at once."""
        return self.loss_chunk or 1 << max(0, (2**27 // (self.outputs or 1)).bit_length() - 1)

    @property
    def block_vectors(self) -> int:
        """Return the numbers in a block's biases and norms; two norms are inside of sub-layers."""
        return super().block_vectors - (0 if self.sub_norm else 2 * self.dim + 2 * self.inner_dim)

    @property
    def outer_vectors(self) -> int:
        """Return the numbers in norms outside of blocks, in the bias of the projection, and in the cls row."""
        norms = self.embedding_norm + self.final_norm + (self.pool_norm_eps is not None)
        return self.dim * (2 * norms + self.cls_token + (self.feature_dim is not None))

    @property
    def num_outputs(self) -> int:
        """Return the ids that the head predicts; 0 without a head."""
        return self.outputs or 0

    @property
    def mask_id(self) -> None:
        """Return None: a masked token of an encoder is one of its ids."""

    def style(self, layer: int) -> BlockStyle:
        """Return the style of block ``layer``."""
        # DeepNorm's factors for a stack of M layers without cross-attention: (2M)^(1/4) and (8M)^(-1/4).
        alpha, beta = (2 * self.layers) ** 0.25, (8 * self.layers) ** -0.25
        plain = None if self.sub_norm else 1.0
        return BlockStyle(
            pre_norm=self.pre_norm,
            sub_norm=self.sub_norm,
            residual_scale=alpha if self.deepnorm else 1.0,
            gain=beta if self.deepnorm else plain,
            gated=self.ffn == "gated",
            activation=self.activation,
            activation_float32=self.activation_float32,
            dropout=self.dropout,
            activation_dropout=self.activation_dropout,
            drop_path=self.drop_path * layer / max(1, self.layers - 1),
        )
