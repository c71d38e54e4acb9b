"""GigaPath's slide encoder: features and places of the tiles of a slide in, one vector out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.errors import ConfigError
from longnet_dist.interop.state_dicts import StateDict, load_model, shown_sizes, state_dict_of, without_prefix
from longnet_dist.interop.torchscale import REFUSED, torchscale_names
from longnet_dist.model.encoder import LongNetEncoder
from longnet_dist.model.pretrained import from_pretrained
from longnet_dist.numerics import log_once

PREFIX = "encoder."
_RATES = (1, 2, 4, 8, 16)
_PUBLISHED_DEPTHS = (12, 24)
_PUBLISHED_DIMS = (768, 1024, 1536)  # whose encoders have 16 heads
_SETTINGS = {"layers": "depth", "dim": "dim", "ffn_dim": "mlp_ratio * dim"}
_SHORTEST = 10  # log2 of the shortest segment


class _Default(int):
    """The default of an argument, which differs in its type from the same number where that is given."""


_DEPTH, _DIM, _HEADS, _MLP_RATIO = map(_Default, (12, 768, 16, 4))
_MAX_WSI_SIZE, _TILE_SIZE = 262144, 256
_ARGUMENTS = (
    "depth", "dim", "heads", "mlp_ratio", "max_wsi_size", "tile_size", "global_pool", "dropout", "drop_path",
)  # fmt: skip


class SlideEncoder(nn.Module):
    """Encode slides as GigaPath does.

    Args:
        encoder: with a cls row, or its pool; of :func:`gigapath_slide_encoder`, or loaded from a converted folder.

    Raises:
        ConfigError: the encoder has no pool, or takes no places of two coordinates.
    """

    def __init__(self, encoder: LongNetEncoder) -> None:
        super().__init__()
        if encoder.config.pool == "none" or encoder.config.coordinates != 2:
            raise ConfigError(
                f"a slide encoder pools rows with two coordinates, but pool={encoder.config.pool} and "
                f"coordinates={encoder.config.coordinates}"
            )
        self.encoder = encoder

    def forward(self, features: Tensor, coords: Tensor, lengths: Any = None, all_layers: bool = False) -> list[Tensor]:
        """Return one vector ``(B, E)`` of each slide, or those of all layers.

        Args:
            features: ``(B, n, 1536)``, of the tiles.
            coords: ``(B, n, 2)``, x and y of the tiles, pixels.
            lengths: ``(B,)`` integers, tiles of each slide before its padding; None: all are tiles.
            all_layers: return ``layers + 1`` vectors: of the embedded tiles and of every block's output. They do not
                pass the norm behind the last block, so the last of them differs from the one vector.

        Raises:
            ShapeError: shapes or lengths that do not fit.
        """
        out = self.encoder(features=features, coords=coords, lengths=lengths, hidden_states=all_layers)
        return list(out.pooled_states) if all_layers else [out.pooled]


def gigapath_slide_encoder(
    source: Any,
    *,
    depth: int = _DEPTH,
    dim: int = _DIM,
    heads: int = _HEADS,
    mlp_ratio: float = _MLP_RATIO,
    max_wsi_size: int = _MAX_WSI_SIZE,
    tile_size: int = _TILE_SIZE,
    global_pool: bool = False,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> SlideEncoder:
    """Build GigaPath's slide encoder from its weights, in evaluation mode, float32.

    ::

        encoder = gigapath_slide_encoder("slide_encoder.pth")
        (vector,) = encoder(features, coords)

    Args:
        source: a file (``slide_encoder.pth``), a state dict, ``{"model": state dict}``, or a folder that
            ``longnet convert`` wrote, which has its own settings.
        depth, dim, mlp_ratio: blocks, model dim, feed-forward dim over model dim; those of the weights unless given.
        heads: of the attention, which weights do not show.
        max_wsi_size: side of the largest slide, pixels; the segment lengths follow from it.
        tile_size: side of a tile, pixels.
        global_pool: average the tiles; else take the cls row.
        dropout, drop_path: in training; GigaPath fine-tunes with 0.1 and 0.

    Raises:
        ConfigError: sizes that cannot work, or settings beside a folder.
        CheckpointError: the source cannot be read; or its sizes and keys do not fit.
    """
    if isinstance(source, str | Path) and Path(source).is_dir():
        asked = (depth is not _DEPTH, dim is not _DIM, heads is not _HEADS, mlp_ratio is not _MLP_RATIO,
                 max_wsi_size != _MAX_WSI_SIZE, tile_size != _TILE_SIZE, global_pool, dropout, drop_path)  # fmt: skip
        if given := [name for name, differs in zip(_ARGUMENTS, asked, strict=True) if differs]:
            raise ConfigError(
                f"{source} is a converted encoder, which has its own settings, but {', '.join(given)} is given; leave "
                f"it out, or give the original file"
            )
        return SlideEncoder(from_pretrained(source))  # type: ignore[arg-type]
    state = without_prefix(state_dict_of(source), "cls_token")
    projection = state.get("patch_embed.proj.weight")
    shown = shown_sizes(state, PREFIX)
    found = shown.get("layers", depth) if depth is _DEPTH else depth
    depth, lacking = int(found), depth is _DEPTH and found not in _PUBLISHED_DEPTHS
    dim = int(shown.get("dim", dim) if dim is _DIM else dim)
    ffn_dim = shown.get("ffn_dim") if mlp_ratio is _MLP_RATIO else None
    config = slide_config(
        depth,
        dim,
        int(heads),
        mlp_ratio,
        max_wsi_size,
        tile_size,
        global_pool,
        dropout=dropout,
        drop_path=drop_path,
        feature_dim=1536 if projection is None else projection.shape[-1],
        ffn_dim=ffn_dim or int(dim * mlp_ratio),
    )
    encoder = load_model(config, state, slide_names(config), {}, REFUSED, _SETTINGS)
    if lacking:
        log_once(f"the weights have {depth} layers; give depth if the encoder has another number")
    if dim not in _PUBLISHED_DIMS and heads is _HEADS:
        log_once(f"weights do not show the number of heads, so dim {dim} gets {heads}; give heads if it is another")
    return SlideEncoder(encoder)


def slide_config(
    depth: int = 12,
    dim: int = 768,
    heads: int = 16,
    mlp_ratio: float = 4,
    max_wsi_size: int = 262144,
    tile_size: int = 256,
    global_pool: bool = False,
    **fields: Any,
) -> EncoderConfig:
    """Return the configuration of a slide encoder; ``fields`` replace those that GigaPath has.

    Raises:
        ConfigError: sizes that cannot work.
    """
    own: dict[str, Any] = {
        "dim": dim,
        "layers": depth,
        "heads": heads,
        "ffn_dim": int(dim * mlp_ratio),
        "segment_lengths": slide_segments(max_wsi_size, tile_size),
        "dilation_rates": _RATES,
        "head_offsets": "blocked",
        "feature_dim": 1536,
        "position_embedding": "sincos",
        "coordinates": 2,
        "tile_size": tile_size,
        "cls_token": True,
        "pool": "mean" if global_pool else "cls",
        "pool_norm_eps": 1e-6,
        "activation_float32": True,
        "phantom_keys": True,
    }
    return EncoderConfig(**(own | fields))


def to_gigapath(model: LongNetEncoder) -> StateDict:
    """Return the state dict of a slide encoder under GigaPath's names: the way back of the import.

    Raises:
        ConfigError: the model is no such encoder.
    """
    config = model.config
    if not (config.cls_token and config.feature_dim and config.pool_norm_eps and config.vocab_size is None):
        raise ConfigError("GigaPath's slide encoder has a cls row, a projection of features and a norm behind the pool")
    names = slide_names(config)
    return {names[name]: x.detach().cpu().contiguous() for name, x in model.named_parameters()}


def slide_names(config: EncoderConfig) -> dict[str, str]:
    """Return the name in GigaPath of each parameter of an encoder."""
    names = torchscale_names(config, PREFIX) | {"cls_token": "cls_token"}
    for kind in ("weight", "bias"):
        names |= {f"projection.{kind}": f"patch_embed.proj.{kind}", f"pool_norm.{kind}": f"norm.{kind}"}
    return names


def slide_segments(max_wsi_size: int, tile_size: int) -> tuple[int, ...]:
    """Return GigaPath's segment lengths: five powers of 2 from 1024 to the tiles of the largest slide.

    Their exponents are evenly spaced and real, except for the last, which is rounded down.

    Raises:
        ConfigError: the largest slide has no tile.
    """
    tiles = (int(max_wsi_size) // tile_size) ** 2 if tile_size > 0 else 0
    if tiles < 1:
        raise ConfigError(f"max_wsi_size must be at least tile_size, but they are {max_wsi_size} and {tile_size}")
    return tuple(int(2**exponent) for exponent in np.linspace(_SHORTEST, int(math.log2(tiles)), len(_RATES)))
