"""Writing checkpoints so that a crash at any moment leaves whole ones only."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from longnet_dist.checkpoint.format import (
    ADAMW,
    STATE_FILE,
    WEIGHTS,
    CheckpointState,
    Progress,
    checkpoint_folder,
    checkpoints,
    is_own_folder,
    parse_state,
    put_aside,
    sha256_of,
    step_of,
    tensor_shapes,
)
from longnet_dist.checkpoint.identity import RunIdentity, code_versions
from longnet_dist.checkpoint.zero_tensors import full_tensor, link_optimizer_states
from longnet_dist.config.model import LongNetConfig
from longnet_dist.config.schema import TrainConfig
from longnet_dist.errors import CheckpointError

PARTIAL = re.compile(r"\.step_[0-9]+\.[0-9]*partial")
RETRY_SECONDS = 1.0

Snapshot = Mapping[str, Mapping[str, Tensor]]
"""File name to the float32 tensors, on the CPU, that go into it."""


class CheckpointWriter:
    """Write the checkpoints of a run, on rank 0 and by default beside the training that goes on.

    A checkpoint is copied to the memory of rank 0 at once (12 bytes a parameter) and from there written by a thread. At
    most one is being written: the next waits for it, and so does leaving the context.

    A checkpoint that cannot be written is a warning, and the next one is the next try. The last one is tried again at
    once. ``train.checkpoint_failures`` failures in a row are an error.

    Args:
        run: folder of the run.
        train: which checkpoints to keep, how many may fail, and whether to write beside the training.
        model: the configuration to store.
        identity: of the run, to store.
    """

    def __init__(
        self, run: Path, train: TrainConfig, model: LongNetConfig, identity: RunIdentity | None = None
    ) -> None:
        self._run, self._train, self._model, self._identity = run, train, model, identity
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._failures = 0  # in a row

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        if error == (None, None, None):
            self.finish()

    def save(self, engine: Any, progress: Progress, last: bool = False) -> None:
        """Write the state after a step. Every rank must call; it then may change the model again.

        Args:
            engine: of the run.
            progress: of the run.
            last: whether there is no later checkpoint, so that this one is tried again at once if it fails.

        Raises:
            CheckpointError: this checkpoint, or the one before, is one too many that cannot be written.
        """
        self.finish()
        snapshot = take_snapshot(engine, progress.step > progress.skipped, self._train.optimizer)
        if dist.get_rank() == 0:
            self._writing = self._thread.submit(self._write, snapshot, progress, last)
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

    def _write(self, snapshot: Snapshot, progress: Progress, last: bool) -> None:
        folder = checkpoint_folder(self._run, progress.step)
        while True:
            try:
                write_checkpoint(folder, snapshot, self._model, progress, self._identity, self._train.optimizer)
                break
            except (OSError, SafetensorError) as error:
                self._count_failure(folder, error)
            if not last:
                return
            time.sleep(RETRY_SECONDS)
        self._failures = 0
        for message in delete_old(self._run, self._train.keep_last, self._train.keep_every, self._train.keep_best):
            _warn(message)

    def _count_failure(self, folder: Path, error: Exception) -> None:
        """Warn of a checkpoint that cannot be written, or raise if it is one too many."""
        self._failures += 1
        limit = self._train.checkpoint_failures
        message = f"cannot write the checkpoint {folder}: {error}"
        before = checkpoints(self._run)
        newest = f"the newest whole one is {before[-1]}" if before else "there is none before it"
        if self._failures >= limit:
            raise CheckpointError(
                f"{message}; that is failure {self._failures} in a row (train.checkpoint_failures={limit}), and "
                f"{newest}; make room, or use another train.output_dir, then go on with train.resume=auto"
            ) from None
        _warn(
            f"{message}; training goes on and tries again, {newest}; {limit} failures in a row end the run "
            f"(train.checkpoint_failures), this is the {self._failures}."
        )


def take_snapshot(engine: Any, has_optimizer_states: bool = True, optimizer: str = ADAMW) -> Snapshot:
    """Copy the whole training state into the memory of rank 0, where nothing changes it. Every rank must call.

    Each tensor is gathered on all ranks in turn; ranks other than 0 keep none.

    Args:
        engine: after any number of steps.
        has_optimizer_states: False if no step has changed anything yet, so that there are none; they count as zero.
        optimizer: the value of ``train.optimizer``.
    """
    if has_optimizer_states:
        link_optimizer_states(engine)
    snapshot: dict[str, dict[str, Tensor]] = {}
    parameters = dict(engine.module.named_parameters())
    for state, shapes in tensor_shapes(optimizer, engine.module).items():
        tensors = snapshot.setdefault(f"{state or WEIGHTS}.safetensors", {})
        for name, shape in shapes.items():
            if state is None or has_optimizer_states:
                whole = full_tensor(engine, parameters[name], state)
            else:
                whole = torch.zeros(shape)
            if dist.get_rank() == 0:
                tensors[name] = whole.reshape(shape).to("cpu", torch.float32, copy=True).contiguous()
    return snapshot


def write_checkpoint(
    folder: Path,
    snapshot: Snapshot,
    model: LongNetConfig,
    progress: Progress,
    identity: RunIdentity | None = None,
    optimizer: str = ADAMW,
) -> None:
    """Write ``folder``; it gets its name when all of it is on the disk. What fails leaves nothing.

    Something else that has the name is renamed, with a warning.

    Args:
        folder: of the checkpoint.
        snapshot: its tensors.
        model: configuration of the model.
        progress: of the run.
        identity: of the run.
        optimizer: the value of ``train.optimizer``, whose states are in the snapshot.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    partial = _partial(folder)
    partial.mkdir(parents=True)
    try:
        sha256 = {}
        for name, tensors in snapshot.items():
            save_file(dict(tensors), partial / name)
            _flush(partial / name)
            sha256[name] = sha256_of(partial / name)
        fields = model.model_dump(mode="json")
        state = CheckpointState(
            **progress.model_dump(),
            optimizer=optimizer,
            model=fields,
            sha256=sha256,
            versions=code_versions(),
            identity=identity,
        ).sealed()
        (partial / STATE_FILE).write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")
        _flush(partial / STATE_FILE)
        _flush(partial)
        if os.path.lexists(folder):
            _warn(f"{folder} was in the way of a checkpoint; it is now {put_aside(folder, 'foreign')}")
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # room for what else must be written
        raise
    _flush(folder.parent)


def delete_old(run: Path, keep_last: int, keep_every: int = 0, keep_best: bool = False) -> list[str]:
    """Delete all but the newest ``keep_last`` checkpoints and those of every ``keep_every`` steps.

    ``keep_last=0`` keeps all, ``keep_every=0`` none beside the newest. ``keep_best`` keeps the one with the least
    validation loss, too.

    Returns:
        A message for each that cannot be deleted.
    """
    old = checkpoints(run)[:-keep_last] if keep_last else []
    best = _best(checkpoints(run)) if old and keep_best else None
    old = [folder for folder in old if (not keep_every or step_of(folder) % keep_every) and folder != best]
    # Without its name first, so that a crash half-way leaves no torn checkpoint.
    return _remove(old, rename=True)


def _best(folders: Iterable[Path]) -> Path | None:
    """Return the checkpoint with the least validation loss; None if none was validated."""
    losses = {}
    for folder in folders:
        with suppress(CheckpointError):
            losses[folder] = parse_state(folder).validation_loss
    validated = {folder: loss for folder, loss in losses.items() if loss is not None}
    return min(validated, key=lambda folder: validated[folder], default=None)


def remove_partial(run: Path) -> list[str]:
    """Remove what a crash left of checkpoints that were being written or deleted.

    Returns:
        A message for each that cannot be removed.
    """
    try:
        entries = list((run / "checkpoints").iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return _remove([path for path in entries if PARTIAL.fullmatch(path.name) and is_own_folder(path)])


def _remove(folders: Iterable[Path], rename: bool = False) -> list[str]:
    messages = []
    for folder in folders:
        try:
            shutil.rmtree(folder.rename(_partial(folder)) if rename else folder)
        except OSError as error:
            messages.append(f"cannot remove {folder}: {error}; it is left where it is")
    return messages


def _partial(folder: Path) -> Path:
    """Return a name that nothing has, for a checkpoint that is being written or deleted."""
    names = (f".{folder.name}.{number}partial" if number else f".{folder.name}.partial" for number in count())
    return next(path for name in names if not os.path.lexists(path := folder.with_name(name)))


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _flush(path: Path) -> None:
    """Let a file's or folder's content reach the disk; Windows flushes no folders, and only files opened to write."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
