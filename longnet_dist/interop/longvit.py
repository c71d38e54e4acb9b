"""LongViT: images of up to 32,768 pixels a side, whose patches are the rows of a LongNet encoder."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.errors import CheckpointError, ConfigError, ShapeError
from longnet_dist.interop.state_dicts import StateDict, load_model, state_dict_of, without_prefix
from longnet_dist.interop.torchscale import FIRST_KEY, REFUSED, torchscale_names
from longnet_dist.model.encoder import EncoderOutput, LongNetEncoder

PREFIX = "encoder."
_RATES = (1, 2, 4, 8, 16)
_SEGMENTS = {
    4096: (1024, 2048, 4096, 8192, 16384),
    8192: (1024, 4096, 8192, 16384, 65536),
    16384: (1024, 4096, 16384, 65536, 262144),
    32768: (1024, 4096, 32768, 262144, 1048576),
}
_OTHER_SEGMENTS = (64, 128, 256, 512, 1024)
_CHANNELS = 3
_SETTINGS = {"layers": "the number of layers", "dim": "the dim", "ffn_dim": "the feed-forward dim"}


class LongViT(nn.Module):
    """Encode images as LongViT does.

    Args:
        encoder: of :func:`longvit_encoder`, or loaded from a converted folder.

    Attributes:
        patch_size: side of a patch, pixels.
    """

    def __init__(self, encoder: LongNetEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.patch_size = math.isqrt((encoder.config.feature_dim or 0) // _CHANNELS)
        if self.patch_size < 1 or _CHANNELS * self.patch_size**2 != encoder.config.feature_dim:
            raise ConfigError(
                f"features of LongViT are square patches of {_CHANNELS} channels, but feature_dim is "
                f"{encoder.config.feature_dim}"
            )

    def forward(self, images: Tensor, hidden_states: bool = False) -> EncoderOutput:
        """Return the states of the patches, row by row of the image, ``(B, n, E)``, and what the encoder has besides.

        Args:
            images: ``(B, 3, side, side)``, of the side that the learned positions are for.
            hidden_states: also return the hidden states of all layers.

        Raises:
            ShapeError: images of another size.
        """
        places = self.encoder.config.max_positions or 0
        side = math.isqrt(places) * self.patch_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (_CHANNELS, side, side):
            raise ShapeError(f"images must be (batch, {_CHANNELS}, {side}, {side}), but are {tuple(images.shape)}")
        patches = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
        out: EncoderOutput = self.encoder(features=patches, hidden_states=hidden_states)
        return out


def longvit_encoder(source: Any, *, heads: int = 16, dropout: float = 0.0, drop_path: float = 0.0) -> LongViT:
    """Build LongViT from its weights, in evaluation mode, float32. All sizes but the heads follow from the weights.

    Args:
        source: a file, a state dict, or one under ``teacher``, ``model`` or ``module``. A pre-trained file keeps the
            model behind ``backbone.``, a fine-tuned one behind ``model.``. Then ``head.`` is left out, and ``fc_norm``
            norms the pool.
        heads: of the attention.
        dropout, drop_path: in training.

    Raises:
        ConfigError: sizes that cannot work.
        CheckpointError: the source cannot be read; or its keys do not fit.
    """
    state = without_prefix(state_dict_of(source), "patch_embed.proj.weight", ignored=("head.",))
    try:
        positions, patch = state["pos_embed"], state["patch_embed.proj.weight"]
        ffn_dim = len(state[PREFIX + FIRST_KEY.replace("self_attn.q_proj", "ffn.fc1")])
        (_, places, dim), (_, channels, side, _) = positions.shape, patch.shape
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"LongViT has pos_embed (1, places, dim), patch_embed.proj.weight (dim, 3, side, side) and {PREFIX}layers; "
            f"here {error} is missing or of another kind, among {sorted(state)[:6]} …"
        ) from None
    config = EncoderConfig(
        dim=dim,
        layers=len({key.split(".")[2] for key in state if key.startswith(f"{PREFIX}layers.")}),
        heads=heads,
        ffn_dim=ffn_dim,
        segment_lengths=_SEGMENTS.get(math.isqrt(places) * side, _OTHER_SEGMENTS),
        dilation_rates=_RATES,
        head_offsets="blocked",
        feature_dim=channels * side * side,
        position_embedding="learned",
        max_positions=places,
        final_norm=False,
        pool="mean",
        pool_norm_eps=1e-5 if "fc_norm.weight" in state else None,
        activation_float32=True,
        dropout=dropout,
        drop_path=drop_path,
        phantom_keys=True,
    )
    return LongViT(load_model(config, state, image_names(config), _shapes(config), REFUSED, _SETTINGS))


def to_longvit(model: LongNetEncoder) -> StateDict:
    """Return the state dict of an encoder under LongViT's names: the way back of the import.

    Raises:
        ConfigError: the model is no such encoder.
    """
    LongViT(model)
    config = model.config
    if config.max_positions is None or config.cls_token:
        raise ConfigError("LongViT has learned positions and no cls row")
    names, shapes = image_names(config), _shapes(config)
    return {
        names[name]: x.detach().cpu().reshape(shapes.get(names[name], tuple(x.shape))).contiguous()
        for name, x in model.named_parameters()
    }


def image_names(config: EncoderConfig) -> dict[str, str]:
    """Return the name in LongViT of each parameter of an encoder."""
    names = torchscale_names(config, PREFIX) | {"learned_positions.weight": "pos_embed"}
    for kind in ("weight", "bias"):
        names |= {f"projection.{kind}": f"patch_embed.proj.{kind}", f"pool_norm.{kind}": f"fc_norm.{kind}"}
    return names


def _shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    side = math.isqrt((config.feature_dim or 0) // _CHANNELS)
    return {
        "pos_embed": (1, config.max_positions or 0, config.dim),
        "patch_embed.proj.weight": (config.dim, _CHANNELS, side, side),
    }
