"""Checkpoints that do not depend on how the run that wrote them was laid out.

A checkpoint is a folder, complete as soon as it has its name::

    checkpoints/step_00000100/
        model.safetensors        float32 master weights, whole tensors by the model's own names
        exp_avg.safetensors      AdamW's running means, by the same names
        exp_avg_sq.safetensors
        state.json               step, tokens, model configuration, SHA-256 of the files, versions

Any number of ranks, mesh and ZeRO stage can go on from it, and reading it runs no code (no pickle).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longnet_dist.config.model import LongNetConfig
from longnet_dist.errors import CheckpointError
from longnet_dist.train.engine import (
    OPTIMIZER_STATES,
    full_tensor,
    link_optimizer_states,
    set_full_tensor,
    set_optimizer_steps,
)

FORMAT = 1
WEIGHTS = "model"
STATE_FILE = "state.json"
MODEL_FIELDS_FREE_TO_CHANGE = {"loss_chunk"}  # memory only, not mathematics


@dataclass(frozen=True)
class CheckpointState:
    """What ``state.json`` holds.

    Attributes:
        step: optimizer steps done.
        tokens: rows trained on, all ranks together.
        model: the fields of the model's configuration.
        sha256: of each tensor file.
        versions: of the packages that wrote it, for the reader's information.
        format: of the checkpoint.
    """

    step: int
    tokens: int
    model: dict[str, Any]
    sha256: dict[str, str]
    versions: dict[str, str]
    format: int = FORMAT


def save_checkpoint(engine: Any, folder: Path, model: LongNetConfig, step: int, tokens: int) -> None:
    """Write ``folder``; it appears with its name when all of it is on the disk. Every rank must call, after a step.

    Each tensor is gathered on all ranks in turn; rank 0 keeps the float32 copy of one file's tensors and writes it.
    """
    link_optimizer_states(engine)
    partial = folder.with_name(f".{folder.name}.partial")
    sha256 = {}
    for state in (None, *OPTIMIZER_STATES):
        tensors = _gather(engine, state)
        if dist.get_rank() == 0:
            partial.mkdir(parents=True, exist_ok=True)
            file = partial / f"{state or WEIGHTS}.safetensors"
            save_file(tensors, file)
            sha256[file.name] = _sha256(file)
    if dist.get_rank() == 0:
        versions = {name: version(name) for name in ("torch", "deepspeed")}
        content = CheckpointState(step, tokens, model.model_dump(mode="json"), sha256, versions)
        (partial / STATE_FILE).write_text(json.dumps(asdict(content), indent=2) + "\n", encoding="utf-8")
        partial.rename(folder)


def read_state(folder: Path, model: LongNetConfig | None = None) -> CheckpointState:
    """Read ``state.json`` and compare the checksums of the tensor files.

    Args:
        folder: of the checkpoint.
        model: if given, the model that is to go on from it.

    Raises:
        CheckpointError: missing, damaged, of another format, or of another model.
    """
    try:
        state = CheckpointState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
    except OSError as error:
        raise CheckpointError(f"{folder} is no checkpoint: {error.strerror} ({STATE_FILE})") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE_FILE} is damaged or of another version: {error}") from None
    if state.format != FORMAT:
        raise CheckpointError(f"{folder} has format {state.format}, and this version reads {FORMAT}")
    for name, expected in state.sha256.items():
        if not (folder / name).is_file() or _sha256(folder / name) != expected:
            raise CheckpointError(
                f"{folder / name} is missing or damaged: its checksum is not that of {STATE_FILE}; "
                f"remove {folder} to go on from the checkpoint before it"
            )
    if model is not None:
        _check_same_model(folder, state.model, model)
    return state


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put the checkpoint's weights into a model that is not sharded."""
    tensors = load_file(folder / f"{WEIGHTS}.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def restore(engine: Any, folder: Path, step: int) -> None:
    """Put master weights and optimizer states into an engine that has done at least one step. Every rank must call.

    The step makes DeepSpeed allocate the optimizer states; with learning rate 0 it changes no weight, so the model's
    own (for bf16 rounded) weights still are those of :func:`load_weights`.
    """
    link_optimizer_states(engine)
    for state in (None, *OPTIMIZER_STATES):
        tensors = load_file(folder / f"{state or WEIGHTS}.safetensors")
        for name, parameter in engine.module.named_parameters():
            set_full_tensor(engine, parameter, tensors[name].to(engine.device), state)
    set_optimizer_steps(engine, step)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of ``step``."""
    return run / "checkpoints" / f"step_{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step_*"))


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` is, or the newest of the run whose folder it is.

    Raises:
        CheckpointError: there is none.
    """
    if (path / STATE_FILE).is_file():
        return path
    if found := checkpoints(path):
        return found[-1]
    raise CheckpointError(f"{path} is neither a checkpoint nor a run's folder with checkpoints/step_* in it")


def delete_old(run: Path, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` checkpoints; 0 keeps all."""
    for folder in checkpoints(run)[:-keep_last] if keep_last else []:
        shutil.rmtree(folder)


def _gather(engine: Any, state: str | None) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        whole = full_tensor(engine, parameter, state)
        if dist.get_rank() == 0:
            tensors[name] = whole.float().reshape(_shape(parameter)).cpu().contiguous()
    return tensors


def _shape(parameter: nn.Parameter) -> torch.Size:
    """The whole shape; ZeRO stage 3 leaves an empty tensor in a parameter's place."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _check_same_model(folder: Path, saved: dict[str, Any], model: LongNetConfig) -> None:
    ours = model.model_dump(mode="json")
    for field in sorted((saved.keys() | ours.keys()) - MODEL_FIELDS_FREE_TO_CHANGE):
        if saved.get(field) != ours.get(field):
            raise CheckpointError(
                f"{folder} is a checkpoint of another model: model.{field} is {saved.get(field)!r} there and "
                f"{ours.get(field)!r} here; use the same value, or another train.output_dir"
            )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
