"""Writing checkpoints so that a crash at any moment leaves whole ones only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from longnet_dist import __version__
from longnet_dist.checkpoint.format import (
    STATE_FILE,
    WEIGHTS,
    CheckpointState,
    checkpoint_folder,
    checkpoints,
    sha256_of,
    step_of,
)
from longnet_dist.checkpoint.zero_tensors import OPTIMIZER_STATES, full_tensor, link_optimizer_states, whole_shape
from longnet_dist.config.model import LongNetConfig
from longnet_dist.config.schema import TrainConfig
from longnet_dist.errors import CheckpointError

PARTIAL = ".partial"

Snapshot = Mapping[str, Mapping[str, Tensor]]
"""File name to the float32 tensors, on the CPU, that go into it."""


class CheckpointWriter:
    """Writes the checkpoints of a run, on rank 0 and by default beside the training that goes on.

    A checkpoint is copied to the memory of rank 0 at once (12 bytes a parameter) and from there written by a thread. At
    most one is being written: the next waits for it, and so does leaving the context.

    Args:
        run: folder of the run.
        train: which checkpoints to keep, and whether to write beside the training.
        model: the configuration to store.
    """

    def __init__(self, run: Path, train: TrainConfig, model: LongNetConfig) -> None:
        self._run, self._train, self._model = run, train, model
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        if error == (None, None, None):
            self.finish()

    def save(self, engine: Any, step: int, tokens: int, skipped: int) -> None:
        """Write the state after ``step``. Every rank must call; it then may change the model again.

        Raises:
            CheckpointError: this checkpoint, or the one before, cannot be written.
        """
        self.finish()
        snapshot = take_snapshot(engine, has_optimizer_states=step > skipped)
        if dist.get_rank() == 0:
            self._writing = self._thread.submit(self._write, snapshot, step, tokens, skipped)
            if not self._train.checkpoint_async:
                self.finish()

    def finish(self) -> None:
        """Wait until nothing is being written, and raise what went wrong."""
        if self._writing:
            writing, self._writing = self._writing, None
            writing.result()

    def check(self) -> None:
        """Raise what went wrong in a thread that has ended, without waiting for one that has not."""
        if self._writing and self._writing.done():
            self.finish()

    def _write(self, snapshot: Snapshot, step: int, tokens: int, skipped: int) -> None:
        folder = checkpoint_folder(self._run, step)
        try:
            write_checkpoint(folder, snapshot, self._model, step, tokens, skipped)
            delete_old(self._run, self._train.keep_last, self._train.keep_every)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(_partial(folder), ignore_errors=True)  # room for what else must be written
            raise CheckpointError(
                f"cannot write the checkpoint {folder}: {error}; make room, or use another train.output_dir, then go "
                f"on from the checkpoint before it with train.resume=auto"
            ) from None


def take_snapshot(engine: Any, has_optimizer_states: bool = True) -> Snapshot:
    """The whole training state in the memory of rank 0, where nothing changes it. Every rank must call.

    Each tensor is gathered on all ranks in turn; ranks other than 0 keep none.

    Args:
        engine: after any number of steps.
        has_optimizer_states: False if no step has changed anything yet, so that there are none; they count as zero.
    """
    if has_optimizer_states:
        link_optimizer_states(engine)
    snapshot: dict[str, dict[str, Tensor]] = {}
    for state in (None, *OPTIMIZER_STATES):
        tensors = snapshot.setdefault(f"{state or WEIGHTS}.safetensors", {})
        for name, parameter in engine.module.named_parameters():
            shape = whole_shape(parameter)
            if state is None or has_optimizer_states:
                whole = full_tensor(engine, parameter, state)
            else:
                whole = torch.zeros(shape)
            if dist.get_rank() == 0:
                tensors[name] = whole.reshape(shape).to("cpu", torch.float32, copy=True).contiguous()
    return snapshot


def write_checkpoint(
    folder: Path, snapshot: Snapshot, model: LongNetConfig, step: int, tokens: int, skipped: int
) -> None:
    """Write ``folder``; it gets its name when all of it is on the disk.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    sha256 = {}
    for name, tensors in snapshot.items():
        save_file(dict(tensors), partial / name)
        _flush(partial / name)
        sha256[name] = sha256_of(partial / name)
    fields, versions = model.model_dump(mode="json"), _versions()
    state = CheckpointState(step=step, tokens=tokens, skipped=skipped, model=fields, sha256=sha256, versions=versions)
    (partial / STATE_FILE).write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")
    _flush(partial / STATE_FILE)
    _flush(partial)
    partial.rename(folder)
    _flush(folder.parent)


def _versions() -> dict[str, str]:
    """Return the versions of this package and of those that a result depends on, where they are installed."""
    versions = {"longnet-dist": __version__}
    for name in ("torch", "deepspeed"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def delete_old(run: Path, keep_last: int, keep_every: int = 0) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and those of every ``keep_every`` steps.

    ``keep_last=0`` keeps all, ``keep_every=0`` none beside the newest.
    """
    for folder in checkpoints(run)[:-keep_last] if keep_last else []:
        if not keep_every or step_of(folder) % keep_every:
            # Without its name first, so that a crash half-way leaves no torn checkpoint.
            shutil.rmtree(folder.rename(_partial(folder)))


def remove_partial(run: Path) -> None:
    """Remove what a crash left of checkpoints that were being written or deleted."""
    for folder in (run / "checkpoints").glob(f".step_*{PARTIAL}"):
        shutil.rmtree(folder)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{PARTIAL}")


def _flush(path: Path) -> None:
    """Let a file's or folder's content reach the disk; Windows flushes no folders, and only files opened to write."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
