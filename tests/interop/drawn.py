"""Weights, features and places of the slide-encoder cases, made from names."""

import hashlib
import json
import math
from pathlib import Path

import torch

CASES = json.loads((Path(__file__).parent / "gigapath_cases.json").read_text())


def draw(name, shape):
    """The value of parameter ``name``: reproducible, independent of order."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    *parts, last = name.split(".")
    if any(part.endswith(("norm", "_ln", "layernorm")) for part in parts):
        return 1 + 0.1 * noise if last == "weight" else 0.1 * noise
    return noise * (1.6 / math.sqrt(shape[1])) if len(shape) == 2 else 0.2 * noise


def features(name, tiles):
    return draw(f"{name}/features", (1, tiles, 1536))


def places(tiles, grid):
    """Pixel coordinates of tiles at distinct places of a grid of 256-pixel tiles."""
    found = torch.randperm(grid * grid, generator=torch.Generator().manual_seed(7))[:tiles]
    return (torch.stack([found // grid, found % grid], -1).float() * 256 + 13)[None]


def slide_weights(layout, layers):
    """A state dict of the slide encoder ``layout``."""
    state = {}
    for key, shape in CASES["state_dict_keys_first_layer"][layout].items():
        for layer in range(layers if "layers.0" in key else 1):
            name = key.replace("layers.0", f"layers.{layer}")
            state[name] = draw(name, tuple(shape))
    return state
