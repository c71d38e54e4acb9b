"""Feed-forward networks of a Hugging Face model in tiles of tokens: their wide activations never exist whole."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longnet_dist.errors import ConfigError

NAMES = ("mlp", "feed_forward", "ffn")
"""How transformers calls the feed-forward network of a layer."""
_TILE = "_longnet_dist_tile"


def tile_mlps(model: nn.Module, tile: int) -> int:
    """Let every feed-forward network of a model compute ``tile`` tokens at a time; return how many there are.

    Output and gradients equal those without tiles. A tile is recomputed in the backward pass, so only inputs and
    outputs ``(B, n, E)`` are kept. Calling it again changes the tile.

    Args:
        model: of transformers, whose layers have a module ``mlp``, ``feed_forward`` or ``ffn`` that maps each token
            alone, ``(B, n, E)`` to ``(B, n, E)``.
        tile: tokens, at least 1.

    Raises:
        ConfigError: a tile below 1, or a model without such modules, or with experts, which see all tokens at once.
    """
    if tile < 1:
        raise ConfigError(f"a tile must have at least 1 token, but mlp_tile={tile}; use 1024")
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] in NAMES]
    if not found or any(_has_experts(module) for module in found):
        what = "experts in them" if found else f"no modules {', '.join(NAMES)}"
        raise ConfigError(
            f"tiles need feed-forward networks that map each token alone, but {type(model).__name__} has {what}; "
            f"leave mlp_tile out"
        )
    for module in found:
        _tile(module, tile)
    return len(found)


def _has_experts(module: nn.Module) -> bool:
    return any(name in ("experts", "router", "gate") for name, _ in module.named_children())


def _tile(module: nn.Module, tile: int) -> None:
    known = hasattr(module, _TILE)
    setattr(module, _TILE, tile)
    if known:
        return
    # The subclass reads the original forward, so copies of the model and adapters inside it work.
    original = type(module)

    @wraps(original.forward)
    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def whole(part: Tensor) -> Tensor:
            result: Tensor = original.forward(self, part, *args, **kwargs)
            return result

        size = getattr(self, _TILE)
        if x.shape[-2] <= size:
            return whole(x)
        parts = torch.split(x, size, dim=-2)
        if not torch.is_grad_enabled():
            return torch.cat([whole(part) for part in parts], -2)
        return torch.cat([checkpoint(whole, part, use_reentrant=False) for part in parts], -2)

    module.__class__ = type(original.__name__, (original,), {"forward": forward, "__module__": original.__module__})
