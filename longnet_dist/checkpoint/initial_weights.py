"""A new run may begin with the weights of a trained model (``train.init``)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from longnet_dist.checkpoint.format import STATE_FILE, WEIGHTS, newest_checkpoint, parse_state, sha256_of
from longnet_dist.checkpoint.identity import digest_of_tokenizer
from longnet_dist.config.model import LongNetConfig
from longnet_dist.errors import CheckpointError
from longnet_dist.model.longnet import LongNet
from longnet_dist.model.pretrained import CONFIG_FILE, TOKENIZER_FILE


@dataclass(frozen=True)
class InitialWeights:
    """InitialWeights are weights of a trained model that fit the model of a run.

    Attributes:
        folder: of the checkpoint or exported model.
        sha256: of the weights.
        tokenizer: SHA-256 of the tokenizer that the model was trained with; None if unknown.
    """

    folder: Path
    sha256: str
    tokenizer: str | None

    @classmethod
    def find(cls, path: Path, model: LongNetConfig) -> Self:
        """Find the weights that ``path`` means and compare their shapes with a model.

        Args:
            path: a checkpoint, a run's folder, which stands for its newest checkpoint, or an exported model.
            model: of the run that begins with them.

        Raises:
            CheckpointError: there are none, they are damaged, or a shape differs.
        """
        is_exported = (path / CONFIG_FILE).is_file() and not (path / STATE_FILE).is_file()
        folder = path if is_exported else newest_checkpoint(path)
        file = folder / f"{WEIGHTS}.safetensors"
        try:
            sha256 = sha256_of(file)
            with safe_open(file, "pt") as tensors:
                found = {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
            tokenizer = _exported_tokenizer(folder) if is_exported else None
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"train.init={path}: cannot read the weights in {file}: {error}") from None
        if not is_exported:
            state = parse_state(folder)
            if state.sha256.get(file.name) != sha256:
                raise CheckpointError(f"train.init={path}: {file} is damaged: its checksum is not that of {STATE_FILE}")
            tokenizer = state.identity.tokenizer if state.identity else None
        _check_shapes(path, found, model)
        return cls(folder, sha256, tokenizer)


def _exported_tokenizer(folder: Path) -> str | None:
    file = folder / TOKENIZER_FILE
    return digest_of_tokenizer(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _check_shapes(path: Path, found: dict[str, Any], model: LongNetConfig) -> None:
    with torch.device("meta"):
        needed = {name: list(parameter.shape) for name, parameter in LongNet(model).named_parameters()}
    for name in sorted(found.keys() | needed.keys()):
        if found.get(name) != needed.get(name):
            there, here = (part.get(name, "missing") for part in (found, needed))
            raise CheckpointError(
                f"train.init={path} does not fit the model: the shape of {name} is {there} there and {here} here; "
                "use the model section of that run"
            )
