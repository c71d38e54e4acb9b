"""Checkpoints that do not depend on how the run that wrote them was laid out.

A checkpoint is a folder, complete as soon as it has its name::

    checkpoints/step_00000100/
        model.safetensors        float32 master weights, whole tensors by the model's own names
        exp_avg.safetensors      AdamW's running means, by the same names; another optimizer has files of its own
        exp_avg_sq.safetensors
        state.json               progress, optimizer, model, identity of the run, SHA-256 of the files, versions

A large checkpoint has its tensors in parts, one of each rank (``checkpoint/parts.py``); ``state.json`` is written when
all parts are on the disk. Any number of ranks, mesh and ZeRO stage can go on from both, and reading runs no code (no
pickle). The order of samples, hidden rows and dropout follow from seed and step, so there is no state of a random
generator to keep. ``checkpoint/writer.py`` writes checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from torch import nn

from longnet_dist.checkpoint.identity import MODEL_FIELDS_FREE_TO_CHANGE, RunIdentity, digest_of
from longnet_dist.checkpoint.parameter_roles import parameter_roles
from longnet_dist.checkpoint.parts import SavedTensors, file_name, files_of, num_parts
from longnet_dist.checkpoint.zero_tensors import (
    allocate_optimizer_states,
    held_range,
    set_held,
    set_optimizer_steps,
    whole_shape,
)
from longnet_dist.config.model import LongNetConfig
from longnet_dist.errors import CheckpointError
from longnet_dist.model.pretrained import weights_prefix
from longnet_dist.optim.optimizers import OPTIMIZERS
from longnet_dist.optim.schedules import ScheduleStart

FORMAT, FORMAT_OF_PARTS = 1, 2
WEIGHTS = "model"
ADAMW = "adamw"  # the optimizer of checkpoints that name none
STATE_FILE = "state.json"
HASHING_THREADS = 4  # of a rank; the ranks of a machine read the same files
NAME = re.compile("step_[0-9]+")


class DamagedCheckpointError(CheckpointError):
    """Refuse a checkpoint that is not what was written: torn by a crash, or changed since."""


class Progress(BaseModel):
    """Say how far a run has come; it is the same on every rank.

    Attributes:
        step: training steps done.
        tokens: tokens trained on, all ranks together.
        samples: samples trained on; None in a checkpoint of a version that did not count them.
        skipped: steps among them that changed nothing, because loss or gradient was not finite or a spike.
        spikes: the spikes among the skipped steps.
        recent: pairs of loss and gradient norm of the last steps, oldest first, if spikes are skipped.
        validation_loss: of the validation after this step, nats; None if there was none.
        best_validation_loss: least one so far; None if there was none.
        validations_since_best: number of validations since then.
        schedule_start: where the learning-rate schedule started again, if it did.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    step: PositiveInt
    tokens: NonNegativeInt
    samples: NonNegativeInt | None = None
    skipped: NonNegativeInt = 0
    spikes: NonNegativeInt = 0
    recent: list[list[float]] = Field(default_factory=list)
    validation_loss: float | None = None
    best_validation_loss: float | None = None
    validations_since_best: NonNegativeInt = 0
    schedule_start: ScheduleStart | None = None


class CheckpointState(Progress):
    """Hold the fields of ``state.json``.

    Attributes:
        optimizer: name of the optimizer whose states these are (``train.optimizer``).
        model: the fields of the model's configuration.
        sha256: of each tensor file.
        versions: of this package, with a checksum of its sources, and of the packages that it computes with.
        identity: of the run; None in a checkpoint of a version that did not keep it.
        digest: SHA-256 of all the rest of the state, which the checksums of the tensor files are part of.
        format: of the checkpoint: 1 with whole tensors, 2 in parts.
    """

    optimizer: str = ADAMW
    model: dict[str, Any]
    sha256: dict[str, str]
    versions: dict[str, str]
    identity: RunIdentity | None = None
    digest: str | None = None
    format: int = FORMAT

    def sealed(self) -> CheckpointState:
        """Return the same state with its digest."""
        return self.model_copy(update={"digest": _digest_of_state(self.model_dump(mode="json"))})

    @property
    def weights_sha256(self) -> str:
        """Return the SHA-256 of the file of the weights, or one of those of its parts."""
        sums = [self.sha256[name] for name in files_of(self.sha256, WEIGHTS)]
        return sums[0] if len(sums) == 1 else digest_of(sums)


def state_names(optimizer: str) -> tuple[str, ...]:
    """Return the names of an optimizer's states, over all roles of parameters; each is a file of a checkpoint."""
    states = OPTIMIZERS[optimizer].states
    kinds = (states("matrix", (1, 1)), states("head", (1, 1)), states("embedding", (1, 1)), states("vector", (1,)))
    return tuple(dict.fromkeys(name for kind in kinds for name in kind))


def tensor_shapes(optimizer: str, model: nn.Module) -> dict[str | None, dict[str, torch.Size]]:
    """Return for the weights, by None, and for each state the shapes of the whole tensors, by names of parameters.

    Args:
        optimizer: a value of ``train.optimizer``.
        model: any module, also with parameters that ZeRO has sharded.
    """
    shapes: dict[str | None, dict[str, torch.Size]] = {name: {} for name in (None, *state_names(optimizer))}
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        shapes[None][name] = whole_shape(parameter)
        for state, shape in OPTIMIZERS[optimizer].states(roles[name], tuple(whole_shape(parameter))).items():
            shapes[state][name] = torch.Size(shape)
    return shapes


def tensor_files(optimizer: str = ADAMW, parts: int = 1) -> tuple[str, ...]:
    """Return the names of the tensor files in a checkpoint of an optimizer, in this number of parts.

    Of an optimizer that is not registered they are those of the weights: somebody else's may not be, and weights are
    read without it.
    """
    kinds = (WEIGHTS, *(state_names(optimizer) if optimizer in OPTIMIZERS.names() else ()))
    return tuple(file_name(kind, number, parts) for kind in kinds for number in range(parts))


def read_state(folder: Path, model: LongNetConfig | None = None) -> CheckpointState:
    """Read ``state.json`` and compare the checksums of the tensor files.

    Args:
        folder: of the checkpoint.
        model: if given, the model that is to go on from it.

    Raises:
        DamagedCheckpointError: a file is missing or not what was written.
        CheckpointError: of another format, or of another model.
    """
    state = parse_state(folder)
    known = tensor_files(state.optimizer, num_parts(state.sha256))
    if file := damaged_file(folder, state, dict.fromkeys((*known, *state.sha256))):
        raise DamagedCheckpointError(
            f"{file} is missing or damaged: its checksum is not that of {STATE_FILE}; "
            f"remove {folder} to go on from the checkpoint before it"
        )
    if model is not None:
        _check_same_model(folder, state.model, model)
    return state


def damaged_file(folder: Path, state: CheckpointState, names: Iterable[str]) -> Path | None:
    """Return the first of some files of a checkpoint that is missing or not what was written; None if none is."""

    def is_intact(name: str) -> bool:
        try:
            return sha256_of(folder / name) == state.sha256.get(name)
        except OSError:
            return False

    names = list(names)
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        found = [folder / name for name, intact in zip(names, threads.map(is_intact, names), strict=True) if not intact]
    return found[0] if found else None


def saved_tensors(folder: Path, kind: str = WEIGHTS) -> SavedTensors:
    """Open the tensors of a checkpoint, or of an exported model, whose weights have the same name.

    Args:
        folder: of the checkpoint.
        kind: of the tensors: ``model`` or the name of an optimizer's state.

    Raises:
        CheckpointError: there are none, or they cannot be read.
    """
    names = files_of((path.name for path in folder.iterdir()), kind) if folder.is_dir() else []
    if (folder / STATE_FILE).is_file():
        names = files_of(parse_state(folder).sha256, kind)
    return SavedTensors([folder / name for name in names or [file_name(kind)]])


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put the weights of a checkpoint, or of an exported model, into a model that is not sharded.

    Args:
        folder: of the checkpoint or exported model.
        model: with its parameters by name and shape; float32 is rounded to their dtype.

    Raises:
        CheckpointError: other names or shapes.
    """
    prefix = "" if (folder / STATE_FILE).is_file() else weights_prefix(folder)
    parameters = {prefix + name: parameter for name, parameter in model.named_parameters()}
    tensors = saved_tensors(folder)
    tensors.check({name: parameter.shape for name, parameter in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors.read(name).view(parameter.shape))


def check_optimizer(folder: Path, state: CheckpointState, optimizer: str) -> None:
    """Refuse to go on from a checkpoint with another optimizer, whose states are others.

    Raises:
        CheckpointError: the checkpoint is of another optimizer.
    """
    if state.optimizer != optimizer:
        raise CheckpointError(
            f"{folder} is a checkpoint of train.optimizer={state.optimizer}, whose states {optimizer} cannot go on "
            f"from; use train.optimizer={state.optimizer}, or another train.output_dir"
        )


def restore(engine: Any, folder: Path, optimizer_steps: int, optimizer: str = ADAMW) -> None:
    """Put master weights and optimizer states into an engine that has done no step yet. Every rank must call.

    A rank reads only what it holds of them. The model's own (for bf16 rounded) weights must be those of
    :func:`load_weights` already.

    Args:
        engine: DeepSpeed's.
        folder: of the checkpoint.
        optimizer_steps: steps that changed the weights.
        optimizer: the value of ``train.optimizer``, of the engine and of the checkpoint.
    """
    allocate_optimizer_states(engine)
    parameters = dict(engine.module.named_parameters())
    for state, shapes in tensor_shapes(optimizer, engine.module).items():
        tensors = saved_tensors(folder, state or WEIGHTS)
        tensors.check(shapes)
        for name, shape in shapes.items():
            part = held_range(engine, parameters[name], shape.numel())
            set_held(engine, parameters[name], tensors.read(name, *part), state)
    set_optimizer_steps(engine, optimizer_steps)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder in which a run keeps the checkpoint of ``step``."""
    return run / "checkpoints" / f"step_{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first: the folders ``step_`` and digits, no links.

    Whatever else lies among them is not the trainer's.
    """
    try:
        entries = list((run / "checkpoints").iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((path for path in entries if NAME.fullmatch(path.name) and is_own_folder(path)), key=step_of)


def is_own_folder(path: Path) -> bool:
    """Say whether a path is a folder and no link to one."""
    return path.is_dir() and not path.is_symlink()


def put_aside(path: Path, why: str) -> Path:
    """Rename something that has a checkpoint's name; return its new name, ``why``, a number and the old name."""
    names = (path.with_name(f"{why}_{number}_{path.name}") for number in count())
    return path.rename(next(name for name in names if not os.path.lexists(name)))


def step_of(folder: Path) -> int:
    """Return the step in the name of one of :func:`checkpoints`."""
    return int(folder.name.removeprefix("step_"))


def newest_checkpoint(path: Path) -> Path:
    """Return the checkpoint that ``path`` is, or the newest of the run whose folder it is.

    Raises:
        CheckpointError: there is none.
    """
    if (path / STATE_FILE).is_file():
        return path
    if found := checkpoints(path):
        return found[-1]
    raise CheckpointError(f"{path} is neither a checkpoint nor a run's folder with checkpoints/step_* in it")


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checksums_of(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of some files of a folder, by their names; several are read at once.

    Raises:
        OSError: a file cannot be read.
    """
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        return dict(zip(names, threads.map(lambda name: sha256_of(folder / name), names), strict=True))


def parse_state(folder: Path) -> CheckpointState:
    """Read ``state.json`` alone.

    Raises:
        DamagedCheckpointError: it is missing or not what was written.
        CheckpointError: it is of another format.
    """
    try:
        fields = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        state = CheckpointState.model_validate(fields)
    except OSError as error:
        raise DamagedCheckpointError(f"{folder} is no checkpoint: {error.strerror} ({STATE_FILE})") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        message = f"{folder / STATE_FILE} is damaged or of another version: {where}: {fault['msg']}"
        raise DamagedCheckpointError(message) from None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{folder / STATE_FILE} is damaged or of another version: {error}") from None
    if state.format != (FORMAT if num_parts(state.sha256) == 1 else FORMAT_OF_PARTS):
        known = f"{FORMAT}, and {FORMAT_OF_PARTS} in parts"
        raise CheckpointError(f"{folder} has format {state.format}, and this version reads {known}")
    # The digest is that of the file: a state of a version without some of the fields has none of their defaults in it.
    if state.digest not in (None, _digest_of_state(fields)):
        raise DamagedCheckpointError(f"{folder / STATE_FILE} is damaged: its digest is not that of its content")
    return state


def _digest_of_state(fields: Mapping[str, Any]) -> str:
    return digest_of({name: value for name, value in fields.items() if name != "digest"})


def _check_same_model(folder: Path, saved: dict[str, Any], model: LongNetConfig) -> None:
    ours = model.model_dump(mode="json")
    # A checkpoint of an older version lacks the fields that came later, whose defaults change nothing.
    defaults = {name: type(model).model_fields[name].get_default() for name in ours.keys() - saved.keys()}
    saved = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()} | saved
    saved, ours = _with_dotted_names(saved), _with_dotted_names(ours)
    # The checksum of the weights that a run began with is part of its identity.
    for field in sorted((saved.keys() | ours.keys()) - MODEL_FIELDS_FREE_TO_CHANGE - {"weights"}):
        if saved.get(field) != ours.get(field):
            raise CheckpointError(
                f"{folder} is a checkpoint of another model: model.{field} is {saved.get(field)!r} there and "
                f"{ours.get(field)!r} here; use the same value, or another train.output_dir"
            )


def _with_dotted_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a model; those within its config.json, if it has one, under names of their own."""
    inner = fields.get("config")
    if not isinstance(inner, dict):
        return fields
    others = {name: value for name, value in fields.items() if name != "config"}
    return others | {f"config.{name}": value for name, value in inner.items()}
