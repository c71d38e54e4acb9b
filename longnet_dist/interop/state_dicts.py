"""State dicts of other programs: reading them, and giving their tensors to a model under its own names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.errors import CheckpointError, refused_object
from longnet_dist.model.encoder import LongNetEncoder

StateDict = dict[str, Tensor]
_INSIDE = ("model", "module", "teacher", "state_dict")
"""Keys under which files keep the state dict."""
_DEEPEST = 8
"""Most such keys, one inside the other: a damaged file may hold itself."""
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
        if path.suffix == ".safetensors" or _is_safetensors(path):
            return load_file(path)
        with warnings.catch_warnings():  # the errors below say what there is to say
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the tensors of {path}: {error}") from None
    except Exception as error:  # a file of another kind makes torch's unpickler raise errors of many kinds
        if found := refused_object(error):
            raise CheckpointError(
                f"{path} holds more than tensors and plain containers ({found}), and nothing else is read; if you "
                f'trust the file, save its state dict alone: torch.save(torch.load("{path.name}", '
                f'weights_only=False)["model"], "weights.pt")'
            ) from None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} is no file that torch.save or safetensors wrote, or it is cut off or damaged: {reason}; copy it "
            f"again, or save its state dict with torch.save"
        ) from None


def _is_safetensors(path: Path) -> bool:
    """Say whether a file begins as safetensors do: 8 bytes, the length of a JSON object, and that object."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def state_dict_of(source: Any) -> StateDict:
    """Return the state dict that ``source`` is, names (a file) or contains (``{"model": …}`` and the like).

    Raises:
        CheckpointError: there is none.
    """
    found = read_file(source) if isinstance(source, str | Path) else source
    for _ in range(_DEEPEST):
        inner = [found[key] for key in _INSIDE if isinstance(found.get(key), Mapping)] if _is_mapping(found) else []
        if not inner:
            break
        found = inner[0]
    if not _is_mapping(found) or not found or not all(map(_is_named_tensor, found.items())):
        what = f"keys {sorted(map(str, found))[:6]}" if _is_mapping(found) else type(found).__name__
        raise CheckpointError(
            f"expected a state dict, tensors of real numbers by name, also inside one of the keys "
            f"{', '.join(_INSIDE)}, but found {what}; give the state dict itself"
        )
    return dict(found)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    name, tensor = item
    return isinstance(name, str) and isinstance(tensor, Tensor)


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
    """Return a line for each key that is missing, unknown, misshapen or refused; a list for each kind."""
    unknown, because = list[str](), dict[str, list[str]]()
    for key in sorted(state.keys() - expected.keys()):
        reason = next((reason for part, reason in refused.items() if part in key), None)
        (unknown if reason is None else because.setdefault(reason, [])).append(key)
    known = [(key, state[key], shape) for key, shape in sorted(expected.items()) if key in state]
    misshapen = [
        f"{key} has shape {list(x.shape)}, not {list(shape)}" for key, x, shape in known if tuple(x.shape) != shape
    ]
    # A copy into float32 would take the numbers of a quantized model for its weights.
    strange = [
        f"{key} is {str(x.dtype).removeprefix('torch.')} on {x.device.type}, but must hold dense floating-point numbers"
        for key, x, _ in known
        if not x.dtype.is_floating_point or x.is_meta or x.layout != torch.strided
    ]
    return (
        *([f"{key} is unknown: {reason}" for key in keys] for reason, keys in because.items()),
        [f"{key} is missing" for key in sorted(expected.keys() - state.keys())],
        [f"{key} is unknown" for key in unknown],
        misshapen,
        strange,
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
