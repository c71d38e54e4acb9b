"""The file from which a streamed evaluation goes on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longnet_dist.errors import CheckpointError

FORMAT = 3


@dataclass(frozen=True)
class StreamTask:
    """Identify a streamed evaluation: one can resume where an equal one stopped.

    Attributes:
        weights: SHA-256 of the model's weights.
        tokens: SHA-256 of the token file's tokens.
        split: of the token file.
        rows: of the sequence.
        dtype: in which the model computes.
        documents: whether documents are kept apart.
    """

    weights: str
    tokens: str
    split: str
    rows: int
    dtype: str
    documents: bool = False


@dataclass(frozen=True)
class StreamState:
    """Say how far a streamed evaluation is, the same on every rank and for any number of them.

    Attributes:
        row: rows ``[0, row)`` are done.
        loss_sum: of these rows, nats.
        num_labels: labelled ones among them.
        carried: what the layers keep for later rows, see :meth:`~longnet_dist.attention.stream.Stream.carried`.
        num_bytes: bytes of text that the labels stand for.
    """

    row: int
    loss_sum: float
    num_labels: int
    carried: list[Tensor]
    num_bytes: int = 0


def save_stream_state(path: Path, task: StreamTask, state: StreamState) -> None:
    """Write the state; ``path`` always is a complete state, the old or the new one."""
    numbers = {name: value for name, value in vars(state).items() if name != "carried"}
    metadata = {"format": FORMAT, "task": asdict(task), "numbers": numbers}
    partial = path.with_name(f".{path.name}.partial")
    tensors = {f"{layer:06d}": records.cpu().contiguous() for layer, records in enumerate(state.carried)}
    save_file(tensors, partial, {"stream": json.dumps(metadata)})
    with partial.open("r+b") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def load_stream_state(path: Path, task: StreamTask) -> StreamState:
    """Read the state of ``task``.

    Raises:
        CheckpointError: no such file, a damaged one, or one of another task.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["stream"])
            carried = [file.get_tensor(name) for name in sorted(file.keys())]
        if metadata["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {metadata['format']}, and this version reads {FORMAT}")
        state = StreamState(carried=carried, **metadata["numbers"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no state of a streamed evaluation: {error}; run without --resume") from None
    for name, value in asdict(task).items():
        if metadata["task"].get(name) != value:
            raise CheckpointError(
                f"{path} is the state of another evaluation: its {name} is {metadata['task'].get(name)!r}, that of "
                f"this one {value!r}; give the same arguments, or run without --resume"
            )
    return state
