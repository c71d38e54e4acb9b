"""Loss of a text of any length as one sequence, in chunks and constant memory; it can stop and go on."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from longnet_dist.attention.plan_ahead import plan_chunk
from longnet_dist.comm.reductions import total_over_ranks
from longnet_dist.data.batches import Windows
from longnet_dist.data.prefetch import read_ahead
from longnet_dist.geometry.window import Shards
from longnet_dist.inference.evaluation import Evaluation, loss_sums
from longnet_dist.inference.stream_state import StreamState, StreamTask, load_stream_state, save_stream_state
from longnet_dist.model.longnet import LongNet, LongNetOutput

SAVE_SECONDS = 60.0
LAUNCHED_AHEAD = {"cuda": 1}
"""Chunks that are launched before the sums of an earlier one are read, by type of device."""


@dataclass(frozen=True)
class StateFile:
    """Keep the state of a streamed evaluation in a file.

    Attributes:
        path: of the file; it is removed at the end.
        task: the evaluation.
        resume: whether to go on from the file if it is there.
        save_seconds: from one save to the next.
    """

    path: Path
    task: StreamTask
    resume: bool
    save_seconds: float = SAVE_SECONDS

    def load(self) -> StreamState:
        """Return the state to begin with."""
        if self.resume and self.path.exists():
            return load_stream_state(self.path, self.task)
        return StreamState(0, 0.0, 0, [])


def evaluate_stream(
    model: LongNet, windows: Windows, chunk_length: int, device: torch.device, file: StateFile
) -> Evaluation:
    """Mean loss of the first window of a split, chunk by chunk. Every rank of the world must call.

    Args:
        model: in evaluation mode; with a group, which is the world, each chunk is split over its ranks.
        windows: the text, its sequence length that of the whole sequence.
        chunk_length: rows that all ranks hold together at once.
        device: of the model.
        file: keeps the state every so often and on an interrupt, written by rank 0.

    Raises:
        CheckpointError: the state is damaged or of another evaluation.
        KeyboardInterrupt: an interrupt (SIGINT or SIGTERM) on any rank, after the state has been saved.
    """
    state = file.load()
    stream = model.stream(windows.length_of(0), cu_seqlens=windows.documents_of([0]))
    stream.resume(state.row, [records.to(device) for records in state.carried])
    dtype = next(model.parameters()).dtype
    planned = model.stream(windows.length_of(0), cu_seqlens=stream.documents)
    is_first, saved_at = dist.get_rank() == 0, time.monotonic()

    def read(shards: Shards) -> tuple[Tensor, Tensor, int]:
        if planned.documents is not None:
            plan_chunk(model.attentions, planned, shards, dtype, device)
        tokens, labels = windows.local([0], shards.window(stream.rank))
        num_bytes = windows.num_bytes(labels)
        if device.type == "cuda":
            tokens, labels = tokens.pin_memory(), labels.pin_memory()
        return tokens, labels, num_bytes

    def save() -> None:
        windows.token_file.check_unchanged()
        save_stream_state(file.path, file.task, replace(progress.state, carried=stream.carried()))

    bar = tqdm(total=stream.total_rows, initial=state.row, unit="token", unit_scale=True, disable=not is_first)
    with torch.no_grad(), _interrupts() as interrupts, bar:
        progress = _Progress(state, bar, LAUNCHED_AHEAD.get(device.type, 0))
        for shards, (*batch, num_bytes) in read_ahead(read, stream.chunks(chunk_length, state.row)):
            stream.enter(shards)
            output = model(*(part.to(device, non_blocking=True) for part in batch), stream=stream)
            progress.add(shards, _Sums(output, num_bytes, len(interrupts)))
            stop = progress.stop  # before a save of the first rank looks further ahead than the others
            if is_first and (stop or time.monotonic() - saved_at > file.save_seconds):
                progress.finish()
                save()
                saved_at = time.monotonic()
            if stop:
                raise KeyboardInterrupt
        progress.finish()
        if progress.stop:
            if is_first:
                save()
            raise KeyboardInterrupt
    windows.token_file.check_unchanged()
    if is_first:
        file.path.unlink(missing_ok=True)
    return Evaluation.of(progress.state.loss_sum, progress.state.num_labels, progress.state.num_bytes)


class _Sums:
    """What a chunk adds, summed over ranks; a GPU may still be computing it. Every rank must make one.

    Args:
        output: of the model.
        num_bytes: of the labels of this rank.
        signals: to stop, that came to this rank.
    """

    def __init__(self, output: LongNetOutput, num_bytes: int, signals: int) -> None:
        self._sums = total_over_ranks(loss_sums(output, num_bytes, signals))
        self._computed: torch.cuda.Event | None = None
        if self._sums.is_cuda:
            # A copy that waits for these sums alone, not for what is launched after them.
            self._sums = torch.empty(4, dtype=torch.float64, pin_memory=True).copy_(self._sums, non_blocking=True)
            self._computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._computed.record()

    def wait(self) -> list[float]:
        """Return the loss, the number and the bytes of the labels, and the signals."""
        if self._computed is not None:
            self._computed.synchronize()
        values: list[float] = self._sums.tolist()
        return values


class _Progress:
    """Add up chunks, the last ``behind`` of them later, so that a GPU gets the next chunk before it is done with one.

    Attributes:
        state: behind the chunks that were added up.
        stop: whether a signal to stop came to a rank before these were computed.
    """

    def __init__(self, state: StreamState, bar: tqdm[Any], behind: int) -> None:
        self.state, self.stop = state, False
        self._bar, self._behind, self._chunks = bar, behind, deque[tuple[Shards, _Sums]]()

    def add(self, shards: Shards, sums: _Sums) -> None:
        """Take the present chunk, and add up those before it."""
        self._chunks.append((shards, sums))
        self.finish(self._behind)

    def finish(self, left: int = 0) -> None:
        """Add up all chunks but the last ``left``."""
        while len(self._chunks) > left:
            shards, sums = self._chunks.popleft()
            loss, labels, num_bytes, signals = sums.wait()
            old = self.state
            self.state = StreamState(
                shards.stop, old.loss_sum + loss, old.num_labels + int(labels), [], old.num_bytes + int(num_bytes)
            )
            self.stop |= signals > 0
            self._bar.set_postfix_str(f"loss {self.state.loss_sum / max(1, self.state.num_labels):.4f}", refresh=False)
            self._bar.update(shards.stop - shards.start)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The signals to stop that came while inside; a second one of the same kind acts at once."""
    came: list[int] = []

    def note(number: int, _: object) -> None:
        came.append(number)
        signal.signal(number, old[signal.Signals(number)])

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
