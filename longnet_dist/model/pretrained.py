"""A model as a folder of its own, without its run: weights, configuration, tokenizer if it has one. No pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.config.model import HF_MODEL_TYPE, LongNetConfig, own_fields
from longnet_dist.data.tokenizers import Tokenizer, tokenizer_from_json
from longnet_dist.errors import CheckpointError, ConfigError
from longnet_dist.machine import check_writable
from longnet_dist.model.encoder import LongNetEncoder
from longnet_dist.model.longnet import LongNet

WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE = "model.safetensors", "config.json", "tokenizer.json"
OWN_TOKENIZER_FILE = "longnet_tokenizer.json"
"""Where a folder for transformers has the description of our tokenizer."""
_HF_PREFIX = "model."


def save_pretrained(model: LongNet | LongNetEncoder, folder: Path, tokenizer: dict[str, Any] | None = None) -> None:
    """Write a model, in the precision it has, with its configuration and tokenizer.

    Args:
        model: on one device, not sharded.
        folder: new, or empty.
        tokenizer: as its ``to_json`` gives it; None: there is none.

    Raises:
        ConfigError: the folder holds something, or cannot be written.
    """
    try:
        empty_folder(folder)
        _write(model, folder, tokenizer)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write the model to {folder}: {error}") from None


def empty_folder(folder: Path) -> None:
    """Make a folder, or check that it is empty.

    Raises:
        ConfigError: it holds something.
        OSError: it cannot be made.
    """
    check_new(folder)
    folder.mkdir(parents=True, exist_ok=True)


def check_new(folder: Path) -> None:
    """Refuse a folder that cannot become a model's, before there is anything to write.

    Raises:
        ConfigError: it is no folder, holds something, or cannot be made.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty, and nothing in it is overwritten; use another folder")
    check_writable(folder, str(folder))


def from_pretrained(folder: str | Path, device: str | torch.device = "cpu") -> LongNet | LongNetEncoder:
    """Load a model that ``longnet export`` or ``longnet convert`` wrote, in evaluation mode and its own precision.

    A folder for transformers (``--to hf``) is one too; transformers is not needed.

    ::

        model = from_pretrained("exported")
        logits = model(tokens).logits

    Args:
        folder: with ``model.safetensors`` and ``config.json``.
        device: where to put it.

    Raises:
        CheckpointError: a file is missing, damaged, or of another model.
    """
    folder = Path(folder)
    fields, prefix = _fields_in(folder), weights_prefix(folder)
    try:
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        with torch.device("meta"):
            model = _model_of(fields)
        if {prefix + name: parameter.shape for name, parameter in model.named_parameters()} != shapes:
            raise CheckpointError(f"{folder / WEIGHTS_FILE} holds other tensors than the model of {CONFIG_FILE} has")
        weights = load_file(folder / WEIGHTS_FILE, str(device))
        model.load_state_dict({name.removeprefix(prefix): x for name, x in weights.items()}, strict=False, assign=True)
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is no exported model: {error}") from None
    if model.config.tie_embeddings:
        assert model.head is not None
        assert model.embedding is not None
        model.head.weight = model.embedding.weight
    return model.eval()


def weights_prefix(folder: Path) -> str:
    """Return what precedes the names of our parameters in the weights of an exported model.

    It is empty, unless the folder is for transformers (``--to hf``).

    Raises:
        CheckpointError: the configuration is missing or damaged.
    """
    return _HF_PREFIX if _fields_in(folder).get("model_type") == HF_MODEL_TYPE else ""


def tokenizer_file_of(folder: Path) -> Path:
    """Return the file that describes the tokenizer of an exported model; it need not exist."""
    own = folder / OWN_TOKENIZER_FILE
    return own if own.is_file() else folder / TOKENIZER_FILE


def tokenizer_of(folder: Path) -> Tokenizer:
    """Return the tokenizer of an exported model.

    Raises:
        CheckpointError: the folder has none.
        DataError: a description that is not understood.
    """
    file = tokenizer_file_of(folder)
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} has no tokenizer: {error}") from None
    if not isinstance(fields, dict) or "kind" not in fields:
        raise CheckpointError(f"{file} is not the tokenizer of a model that longnet export wrote")
    return tokenizer_from_json(fields)


def _fields_in(folder: Path) -> dict[str, Any]:
    try:
        fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} is no exported model: {error}") from None
    if not isinstance(fields, dict):
        kind = type(fields).__name__
        raise CheckpointError(f"{folder} is no exported model: its {CONFIG_FILE} must be a JSON object, not {kind}")
    return fields


def _model_of(fields: dict[str, Any]) -> LongNet | LongNetEncoder:
    if fields.get("kind") == "encoder":
        return LongNetEncoder(EncoderConfig(**fields))
    return LongNet(LongNetConfig(**own_fields(fields)))


def _write(model: LongNet | LongNetEncoder, folder: Path, tokenizer: dict[str, Any] | None) -> None:
    weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(model.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        (folder / TOKENIZER_FILE).write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
