"""A new run may begin with the weights of a trained model: of ``train.init``, or of the folder ``model.path``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import nn

from longnet_dist.checkpoint.format import (
    STATE_FILE,
    WEIGHTS,
    checksums_of,
    damaged_file,
    newest_checkpoint,
    parse_state,
    sha256_of,
)
from longnet_dist.checkpoint.identity import digest_of, digest_of_tokenizer
from longnet_dist.checkpoint.parts import SavedTensors, file_name, files_of
from longnet_dist.checkpoint.run_model import parameter_sizes
from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.config.hf_model import FAMILIES, HuggingFaceConfig, read_model_config
from longnet_dist.config.model import LongNetConfig
from longnet_dist.errors import CheckpointError
from longnet_dist.model.feature_tasks import FeatureTask
from longnet_dist.model.pretrained import CONFIG_FILE, tokenizer_file_of, weights_prefix

INDEX_FILE = f"{WEIGHTS}.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
ENCODER_PREFIX = "encoder."
"""Of an encoder's weights in the checkpoints of a run on features, which have the head of the task too."""


@dataclass(frozen=True)
class InitialWeights:
    """InitialWeights are weights of a trained model that fit the model of a run.

    Of an encoder they are those without the head of a task, which begins anew.

    Attributes:
        folder: of the checkpoint or exported model.
        sha256: of the weights.
        tokenizer: SHA-256 of the tokenizer that the model was trained with; None if unknown.
        files: the tensor files.
        prefix: of the names in the files, for an encoder in a run on features or a folder for transformers.
    """

    folder: Path
    sha256: str
    tokenizer: str | None
    files: tuple[Path, ...]
    prefix: str = ""

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
        folder, family = path if is_exported else newest_checkpoint(path), None
        try:
            state = None if is_exported else parse_state(folder)
            names = files_of(state.sha256, WEIGHTS) if state else []
            files = tuple(folder / name for name in names or [file_name(WEIGHTS)])
            found = _shapes_in(files)
            if state is None:
                sha256, tokenizer = sha256_of(files[0]), _tokenizer_in(folder)
                prefix, family = weights_prefix(folder), read_model_config(folder).get("model_type")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"train.init={path}: cannot read the weights in {folder}: {error}") from None
        if state is not None:
            if file := damaged_file(folder, state, names):
                raise CheckpointError(f"train.init={path}: {file} is damaged: its checksum is not that of {STATE_FILE}")
            sha256, tokenizer = state.weights_sha256, state.identity.tokenizer if state.identity else None
            prefix = ENCODER_PREFIX if isinstance(model, EncoderConfig) else ""
        found = {name.removeprefix(prefix): shape for name, shape in found.items() if name.startswith(prefix)}
        remedy = f"model.path={path} in place of train.init" if family in FAMILIES else "the model section of that run"
        _check_shapes(f"train.init={path}", found, model, remedy)
        return cls(folder, sha256, tokenizer, files, prefix)

    @classmethod
    def of_model(cls, model: LongNetConfig, begins: bool) -> InitialWeights | None:
        """Return the weights in the folder ``model.path``; None for a LongNet, or where there are none.

        Args:
            model: of a run.
            begins: whether the run has no checkpoint; then the weights are compared with the model. A run that has one
                needs the folder no more, and the checksum that it stored counts.

        Raises:
            CheckpointError: they cannot be read, are pickled, do not fit, or are not those that the run stored.
        """
        if not isinstance(model, HuggingFaceConfig):
            return None
        folder, what = Path(model.path or "").expanduser(), f"model.path={model.path}"
        if model.path is None or (model.weights is not None and not begins and not folder.exists()):
            return None if model.weights is None else cls(folder, model.weights, None, ())
        files, sha256, found = _folder_of_transformers(folder, what)
        if model.weights not in (None, sha256):
            raise CheckpointError(
                f"the configuration names weights with SHA-256 {model.weights} (model.weights), but {what} has "
                f"{sha256 or 'none'}; give the folder with those weights, or leave model.weights out for a new run"
            )
        if sha256 is None:
            return None
        if model.tie_embeddings:
            found.pop("lm_head.weight", None)
        if begins:
            _check_shapes(what, found, model, f"the {CONFIG_FILE} that these weights were saved with")
        return cls(folder, sha256, _tokenizer_in(folder), files)

    def load(self, model: nn.Module) -> None:
        """Put the weights into a model, one tensor after the other; they are rounded to its dtype.

        Args:
            model: not sharded, with the parameters that were compared.

        Raises:
            CheckpointError: a file changed since.
        """
        whole = model.encoder if isinstance(model, FeatureTask) else model
        parameters = {self.prefix + name: parameter for name, parameter in whole.named_parameters()}
        try:
            tensors = SavedTensors(self.files)
            with torch.no_grad():
                for name in parameters.keys() & tensors.shapes.keys():
                    parameters.pop(name).copy_(tensors.read(name).view(tensors.shapes[name]))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"cannot read the weights in {self.folder}: {error}") from None
        if parameters:
            raise CheckpointError(f"{self.folder} lacks weights that it had: {', '.join(sorted(parameters))}")


def _folder_of_transformers(folder: Path, what: str) -> tuple[tuple[Path, ...], str | None, dict[str, Any]]:
    """Return the tensor files of a folder, their checksum (None without files), and the shape of each tensor.

    Raises:
        CheckpointError: they cannot be read, or there are pickles in their place.
    """
    try:
        files = _tensor_files(folder) if folder.is_dir() else ()
        digests, found = checksums_of(folder, [file.name for file in files]), _shapes_in(files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{what}: cannot read the weights in {folder}: {error}") from None
    pickles = [] if files else [file.name for pattern in _PICKLES for file in folder.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"{what} has its weights in {', '.join(sorted(pickles))}, which is not read, since a pickle may run code; "
            f"save them as safetensors, or give {folder / CONFIG_FILE} for weights drawn from train.seed"
        )
    return files, digest_of(digests) if files else None, found


def _tensor_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of tensors in a folder of transformers: those of its index, or the one file."""
    index, whole = folder / INDEX_FILE, folder / f"{WEIGHTS}.safetensors"
    if whole.is_file():
        return (whole,)
    if not index.is_file():
        return tuple(sorted(folder.glob("*.safetensors")))
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return tuple(folder / Path(name).name for name in sorted(set(names)))


def _shapes_in(files: Sequence[Path]) -> dict[str, Any]:
    """Return the shape of each tensor in some files, or in none."""
    return {name: list(shape) for name, shape in SavedTensors(files).shapes.items()} if files else {}


def _tokenizer_in(folder: Path) -> str | None:
    """Return the checksum of a folder's tokenizer, as that of a token file that was made with it; None without one.

    Raises:
        CheckpointError: its file is damaged.
    """
    file = tokenizer_file_of(folder)
    if not file.is_file():
        return None
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return digest_of_tokenizer(fields if "kind" in fields else {"kind": "huggingface", "content": dict(fields)})
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"cannot read the tokenizer in {file}: {error}") from None


def _check_shapes(what: str, found: dict[str, Any], model: LongNetConfig, remedy: str) -> None:
    needed = parameter_sizes(model)
    for name in sorted(found.keys() | needed.keys()):
        if found.get(name) != needed.get(name):
            there, here = (part.get(name, "missing") for part in (found, needed))
            raise CheckpointError(
                f"{what} does not fit the model: the shape of {name} is {there} there and {here} here; use {remedy}"
            )
