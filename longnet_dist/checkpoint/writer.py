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
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from longnet_dist.checkpoint.format import (
    ADAMW,
    FORMAT,
    FORMAT_OF_PARTS,
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
from longnet_dist.checkpoint.parts import file_name, num_parts, piece_name
from longnet_dist.checkpoint.writing_ranks import WRITE_ERRORS, WritingRanks
from longnet_dist.checkpoint.zero_tensors import full_tensor, held, held_range, link_optimizer_states
from longnet_dist.config.model import LongNetConfig
from longnet_dist.config.schema import TrainConfig
from longnet_dist.errors import CheckpointError
from longnet_dist.private_interfaces import default_store

PARTIAL = re.compile(r"\.step_[0-9]+\.[0-9]*partial")
RETRY_SECONDS = 1.0

Snapshot = Mapping[str, Mapping[str, Tensor]]
"""File name to the float32 tensors, on the CPU, that go into it."""


class CheckpointWriter:
    """Write the checkpoints of a run, by default beside the training that goes on. Every rank must have one.

    A checkpoint is copied to host memory at once and from there written by a thread: a small one by rank 0, a large one
    by all ranks, each of which writes what it holds. At most one is being written: the next waits for it, and so does
    leaving the context.

    A checkpoint that cannot be written is a warning, and the next one is the next try. The last one is tried again at
    once. ``train.checkpoint_failures`` failures in a row are an error.

    Args:
        run: folder of the run.
        train: which checkpoints to keep, how many may fail, who writes them, and whether beside the training.
        model: the configuration to store.
        identity: of the run, to store.
        timeout_seconds: for which ranks that write a checkpoint together wait for one another.
    """

    def __init__(
        self,
        run: Path,
        train: TrainConfig,
        model: LongNetConfig,
        identity: RunIdentity | None = None,
        timeout_seconds: float = 1800.0,
    ) -> None:
        self._run, self._train, self._model, self._identity = run, train, model, identity
        self._timeout = timeout_seconds
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._ranks: WritingRanks | None = None  # known with the first checkpoint
        self._failures = 0  # in a row
        run.mkdir(parents=True, exist_ok=True)
        self._makes_folder = not checkpoint_folder(run, 0).parent.is_dir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if error != (None, None, None) and self._ranks and self._ranks.size > 1:
            self._ranks.give_up()  # another rank may have ended, and its part never come
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
        self._ranks = self._ranks or self._ranks_of(engine)
        in_parts = self._ranks.size > 1
        snapshot = take_snapshot(engine, progress.step > progress.skipped, self._train.optimizer, in_parts)
        if dist.get_rank() == 0 or in_parts:
            self._writing = self._thread.submit(self._write, self._ranks, snapshot, progress, last)
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

    def _ranks_of(self, engine: Any) -> WritingRanks:
        """Return the ranks that write the checkpoints of an engine; a rank other than 0 may write none."""
        ranks, world_size = WritingRanks.alone(), dist.get_world_size() if dist.is_initialized() else 1
        if world_size > 1 and self._train.writes_parts(self._num_bytes(engine), world_size):
            ranks = WritingRanks(default_store(), dist.get_rank(), world_size, self._timeout)
        ranks.makes_parents, ranks.makes_folder = False, self._makes_folder
        return ranks

    def _num_bytes(self, engine: Any) -> int:
        shapes = tensor_shapes(self._train.optimizer, engine.module)
        return sum(4 * shape.numel() for kind in shapes.values() for shape in kind.values())

    def _write(self, ranks: WritingRanks, snapshot: Snapshot, progress: Progress, last: bool) -> None:
        """Write a checkpoint; in parts, all ranks come to the same end, and rank 0 tells what goes wrong."""
        folder = checkpoint_folder(self._run, progress.step)
        while True:
            try:
                settings = (self._model, progress, self._identity, self._train.optimizer)
                write_checkpoint(folder, snapshot, *settings, ranks)
                break
            except WRITE_ERRORS as error:
                if ranks.has_given_up:
                    return
                self._count_failure(folder, error, ranks.rank == 0)
            if not last or self._failures >= self._train.checkpoint_failures:
                return
            time.sleep(RETRY_SECONDS)
        self._failures = 0
        if ranks.rank == 0:
            for message in delete_old(self._run, self._train.keep_last, self._train.keep_every, self._train.keep_best):
                _warn(message)

    def _count_failure(self, folder: Path, error: Exception, tell: bool) -> None:
        """Warn of a checkpoint that cannot be written, or raise if it is one too many; on one rank alone."""
        self._failures += 1
        if not tell:
            return
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


def take_snapshot(
    engine: Any, has_optimizer_states: bool = True, optimizer: str = ADAMW, in_parts: bool = False
) -> Snapshot:
    """Copy the training state into host memory, where nothing changes it. Every rank must call.

    Args:
        engine: after any number of steps.
        has_optimizer_states: False if no step has changed anything yet, so that there are none; they count as zero.
        optimizer: the value of ``train.optimizer``.
        in_parts: each rank copies what it holds, and none needs another one; else rank 0 copies whole tensors, each of
            which is gathered on all ranks in turn.
    """
    if has_optimizer_states:
        link_optimizer_states(engine)
    snapshot: dict[str, dict[str, Tensor]] = {}
    parameters = dict(engine.module.named_parameters())
    number, parts = (dist.get_rank(), dist.get_world_size()) if in_parts else (0, 1)
    for state, shapes in tensor_shapes(optimizer, engine.module).items():
        tensors = snapshot.setdefault(file_name(state or WEIGHTS, number, parts), {})
        for name, shape in shapes.items():
            exists = state is None or has_optimizer_states
            if in_parts:
                first, piece = _own_piece(engine, parameters[name], state, shape, exists)
                if piece.numel():
                    tensors[piece_name(name, first, shape)] = _copied(piece)
                continue
            whole = full_tensor(engine, parameters[name], state) if exists else torch.zeros(shape)
            if dist.get_rank() == 0:
                tensors[name] = _copied(whole.reshape(shape))
    return snapshot if in_parts or dist.get_rank() == 0 else {name: {} for name in snapshot}


def _own_piece(
    engine: Any, parameter: nn.Parameter, state: str | None, shape: torch.Size, exists: bool
) -> tuple[int, Tensor]:
    """Return the piece of a tensor that this rank writes, and where it begins; zeros if there are no states yet."""
    first, last = held_range(engine, parameter, shape.numel())
    if engine.zero_optimization_stage() == 0:  # all ranks hold all of it, and each writes its share
        share = -(-shape.numel() // dist.get_world_size())
        first, last = (min(number * share, last) for number in (dist.get_rank(), dist.get_rank() + 1))
        return first, held(engine, parameter, state)[first:last] if exists else torch.zeros(last - first)
    return first, held(engine, parameter, state) if exists else torch.zeros(last - first)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def write_checkpoint(
    folder: Path,
    snapshot: Snapshot,
    model: LongNetConfig,
    progress: Progress,
    identity: RunIdentity | None = None,
    optimizer: str = ADAMW,
    ranks: WritingRanks | None = None,
) -> None:
    """Write ``folder``; it gets its name when all of it is on the disk. What fails leaves nothing.

    Something else that has the name is renamed, with a warning.

    Args:
        folder: of the checkpoint.
        snapshot: its tensors, or this rank's part of them.
        model: configuration of the model.
        progress: of the run.
        identity: of the run.
        optimizer: the value of ``train.optimizer``, whose states are in the snapshot.
        ranks: that write the checkpoint together, all of which must call; if not given, this process alone.

    Raises:
        OSError, SafetensorError: it cannot be written; with several ranks, on all of them.
    """
    ranks = ranks or WritingRanks.alone()
    ranks.begin()
    partial = Path(ranks.told("folder", lambda: _new_partial(folder, ranks)))

    def finish() -> str:
        sha256 = ranks.checksums()
        state = CheckpointState(
            **progress.model_dump(),
            optimizer=optimizer,
            model=model.model_dump(mode="json"),
            sha256=sha256,
            versions=code_versions(),
            identity=identity,
            format=FORMAT if num_parts(sha256) == 1 else FORMAT_OF_PARTS,
        ).sealed()
        (partial / STATE_FILE).write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")
        _flush(partial / STATE_FILE)
        _flush(partial)
        if os.path.lexists(folder):
            _warn(f"{folder} was in the way of a checkpoint; it is now {put_aside(folder, 'foreign')}")
        partial.rename(folder)
        try:
            _flush(folder.parent)
        except OSError:
            folder.rename(partial)  # no rank counts it, so it must not keep the name
            raise
        return str(folder)

    try:
        ranks.say_part(lambda: _write_files(partial, snapshot))
        ranks.told("end", finish)
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # room for what else must be written
        raise
    ranks.makes_folder = False


def _new_partial(folder: Path, ranks: WritingRanks) -> str:
    """Make a folder for a checkpoint that is being written.

    The folder around it is made only if it was never there: a file system that went away leaves an empty place, and
    what is written there is hidden when it comes back.
    """
    if ranks.makes_folder:
        folder.parent.mkdir(parents=ranks.makes_parents, exist_ok=True)
    partial = _partial(folder)
    partial.mkdir()
    return str(partial)


def _write_files(partial: Path, snapshot: Snapshot) -> dict[str, str]:
    """Write tensor files and flush them to the disk; return their checksums."""
    sha256 = {}
    for name, tensors in snapshot.items():
        save_file(dict(tensors), partial / name)
        _flush(partial / name)
        sha256[name] = sha256_of(partial / name)
    return sha256


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
    tqdm.write(f"warning: {message}", file=sys.stderr)


def _flush(path: Path) -> None:
    """Let a file's or folder's content reach the disk; Windows flushes no folders, and only files opened to write."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
