"""Loss of a text of any length as one sequence, in chunks and constant memory; it can stop and go on."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

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
from longnet_dist.model.longnet import LongNet

SAVE_SECONDS = 60.0


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

    bar = tqdm(total=stream.total_rows, initial=state.row, unit="token", unit_scale=True, disable=not is_first)
    with torch.no_grad(), _interrupts() as interrupts, bar:
        for shards, (*batch, read_bytes) in read_ahead(read, stream.chunks(chunk_length, state.row)):
            stream.enter(shards)
            sums = loss_sums(model(*(part.to(device, non_blocking=True) for part in batch), stream=stream), read_bytes)
            # This also waits for the chunk, while the next one is read.
            sums = total_over_ranks(torch.cat([sums, sums.new_tensor([len(interrupts)])]))
            loss, labels, num_bytes, stop = sums.tolist()
            state = StreamState(
                shards.stop, state.loss_sum + loss, state.num_labels + int(labels), [], state.num_bytes + int(num_bytes)
            )
            bar.set_postfix_str(f"loss {state.loss_sum / max(1, state.num_labels):.4f}", refresh=False)
            bar.update(shards.stop - shards.start)
            if is_first and (stop or time.monotonic() - saved_at > file.save_seconds):
                windows.token_file.check_unchanged()
                save_stream_state(file.path, file.task, replace(state, carried=stream.carried()))
                saved_at = time.monotonic()
            if stop:
                raise KeyboardInterrupt
    windows.token_file.check_unchanged()
    if is_first:
        file.path.unlink(missing_ok=True)
    return Evaluation.of(state.loss_sum, state.num_labels, state.num_bytes)


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
