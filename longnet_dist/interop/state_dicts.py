"""State dicts of other programs: reading them, and giving their tensors to a model under its own names."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.errors import CheckpointError
from longnet_dist.model.encoder import LongNetEncoder

StateDict = dict[str, Tensor]
_INSIDE = ("model", "module", "teacher", "state_dict")
"""Keys under which files keep the state dict."""
_FIRST_MATRIX = "layers.0.ffn.fc1.weight"
MOST_FAULTS, SHOWN_FAULTS = 8, 2
"""Faulty keys that are all shown; and if there are more, those of each kind."""


def read_file(path: str | Path) -> Any:
    """Return what a file of ``torch.save`` or of safetensors holds; only tensors and plain containers are read.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds more than tensors and plain containers, and nothing else is read; save its state dict alone"
        ) from None
    except (OSError, SafetensorError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(f"cannot read the tensors of {path}: {error}") from None


def state_dict_of(source: Any) -> StateDict:
    """Return the state dict that ``source`` is, names (a file) or contains (``{"model": …}`` and the like).

    Raises:
        CheckpointError: there is none.
    """
    found = read_file(source) if isinstance(source, str | Path) else source
    while isinstance(found, Mapping):
        inner = next((found[key] for key in _INSIDE if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, Mapping) or not found or not all(isinstance(x, Tensor) for x in found.values()):
        what = type(found).__name__ if not isinstance(found, Mapping) else f"keys {sorted(map(str, found))[:6]}"
        raise CheckpointError(
            f"expected a state dict, tensors by name, also inside one of the keys {', '.join(_INSIDE)}, "
            f"but found {what}"
        )
    return dict(found)


def without_prefix(state: StateDict, known: str, ignored: Sequence[str] = ()) -> StateDict:
    """Return the state dict without the prefix of the key that ends with ``known``.

    Args:
        state: a state dict.
        known: a key that the model has, without prefix.
        ignored: beginnings of keys that belong to other parts of a program, dropped if there is a prefix.
    """
    prefixes = {key.removesuffix(known) for key in state if key.endswith(known)}
    if len(prefixes) != 1 or not (prefix := prefixes.pop()):
        return state
    kept = {key: x for key, x in state.items() if not key.startswith(tuple(ignored)) or key.startswith(prefix)}
    return {key.removeprefix(prefix): x for key, x in kept.items()}


def shown_sizes(state: StateDict, prefix: str = "") -> dict[str, int]:
    """Return ``layers``, ``dim`` and ``ffn_dim`` of the model that a state dict is of, as far as its keys show them.

    Args:
        state: a state dict.
        prefix: of the keys of the layers.
    """
    layers = [re.match(re.escape(prefix) + r"layers\.(\d+)\.", key) for key in state]
    found = {"layers": max((int(layer[1]) + 1 for layer in layers if layer), default=0)}
    first = state.get(f"{prefix}{_FIRST_MATRIX}")
    if first is not None and first.dim() == 2:
        found |= {"ffn_dim": first.shape[0], "dim": first.shape[1]}
    return {name: size for name, size in found.items() if size}


def load_model(
    config: EncoderConfig,
    state: StateDict,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    refused: Mapping[str, str],
    settings: Mapping[str, str],
) -> LongNetEncoder:
    """Build an encoder whose parameters are the tensors of a state dict, float32, or float64 if any is.

    Args:
        config: of the encoder.
        state: tensors by their names there.
        names: the name there of each parameter here.
        shapes: shapes there, where they differ from those here in more than the name.
        refused: parts of names there, and why tensors with them are refused.
        settings: what the caller calls ``layers``, ``dim`` and ``ffn_dim`` of the configuration.

    Raises:
        CheckpointError: with the sizes that differ, and keys that are missing, unknown or misshapen.
    """
    with torch.device("meta"):
        model = LongNetEncoder(config)
    parameters = dict(model.named_parameters())
    expected = {names[name]: shapes.get(names[name], tuple(x.shape)) for name, x in parameters.items()}
    faults = _faults(state, expected, refused)
    if any(faults):
        sizes = _differing_sizes(config, state, names, settings)
        raise CheckpointError("\n".join(["the weights do not fit the configuration:", *sizes, *_shown(faults)]))
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in state.values()) else torch.float32
    weights = {name: state[names[name]].detach().to(dtype, copy=True).view(x.shape) for name, x in parameters.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    if model.head is not None and config.tie_embeddings:
        assert model.embedding is not None
        model.head.weight = model.embedding.weight
    return model.eval()


def _faults(
    state: StateDict, expected: Mapping[str, tuple[int, ...]], refused: Mapping[str, str]
) -> tuple[list[str], ...]:
    """Return a line for each key that is missing, unknown, misshapen or refused; each kind in a list of its own."""
    unknown, because = list[str](), dict[str, list[str]]()
    for key in sorted(state.keys() - expected.keys()):
        reason = next((reason for part, reason in refused.items() if part in key), None)
        (unknown if reason is None else because.setdefault(reason, [])).append(key)
    misshapen = [
        f"{key} has shape {list(state[key].shape)}, not {list(shape)}"
        for key, shape in sorted(expected.items())
        if key in state and tuple(state[key].shape) != shape
    ]
    return (
        *([f"{key} is unknown: {reason}" for key in keys] for reason, keys in because.items()),
        [f"{key} is missing" for key in sorted(expected.keys() - state.keys())],
        [f"{key} is unknown" for key in unknown],
        misshapen,
    )


def _shown(faults: Sequence[list[str]]) -> list[str]:
    """Return the lines of all faults, or if they are many, the first ones of each kind and how many there are."""
    if sum(map(len, faults)) <= MOST_FAULTS:
        return [line for kind in faults for line in kind]
    lines = []
    for kind in faults:
        rest = len(kind) - SHOWN_FAULTS
        shown = kind[:SHOWN_FAULTS]
        lines += [*shown[:-1], f"{shown[-1]}, and {rest} more keys"] if rest > 0 else shown
    return lines


def _differing_sizes(
    config: EncoderConfig, state: StateDict, names: Mapping[str, str], settings: Mapping[str, str]
) -> list[str]:
    prefix = names[f"blocks.0.{_FIRST_MATRIX.partition('.0.')[2]}"].removesuffix(_FIRST_MATRIX)
    given = {"layers": config.layers, "dim": config.dim, "ffn_dim": config.inner_dim}
    return [
        f"{settings[name]} is {size} in the weights, but {given[name]} is asked for"
        for name, size in shown_sizes(state, prefix).items()
        if size != given[name]
    ]
