"""Loss of a model on the held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longnet_dist.comm.mesh import Mesh
from longnet_dist.data.batches import Windows
from longnet_dist.errors import DataError
from longnet_dist.geometry.window import Shards
from longnet_dist.model.longnet import LongNetOutput
from longnet_dist.train.step import total_over_ranks


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        loss: mean cross-entropy of a token, nats.
        tokens: how many were predicted.
        perplexity: ``exp(loss)``.
        bits_per_byte: ``loss`` in bits, for each byte of text: comparable across tokenizers.
    """

    loss: float
    tokens: int
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True)
class _Batch:
    """Windows that one data rank reads at once, the first ``rows`` rows of each."""

    windows: range
    rows: int


def evaluate(
    forward: Callable[..., LongNetOutput],
    windows: Windows,
    num_tokens: int,
    batch_size: int,
    mesh: Mesh,
    device: torch.device,
) -> Evaluation:
    """Mean loss over the first ``num_tokens`` rows of a split, cut into windows. Every rank of the world must call.

    Each window starts without context, so the same rows at a longer ``sequence_length`` show what context is worth.

    Args:
        forward: a model or DeepSpeed engine in evaluation mode.
        windows: the split, cut into windows of the context length.
        num_tokens: rows to read; fewer if the split has fewer or a last, shorter window cannot be shared evenly.
        batch_size: windows that a data rank holds at once.
        mesh: the ranks; data ranks take turns with the batches.
        device: of the model.

    Raises:
        DataError: the text has fewer rows than sequence ranks.
    """
    batches = list(_plan(windows, num_tokens, batch_size, mesh.shape.sequence))
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    num_labels = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        for first in range(0, len(batches), mesh.shape.data):
            # With ZeRO stage 3 a forward is a collective of all ranks: one without a batch repeats the last.
            number = first + mesh.data_rank
            sums = _loss_sum(forward, windows, batches[min(number, len(batches) - 1)], mesh, device)
            if number < len(batches):
                loss_sum += sums[0]
                num_labels += sums[1]
    # Each sequence rank adds its own rows, so the sum over the world counts every row once.
    labels = total_over_ranks(num_labels).item()
    loss = total_over_ranks(loss_sum).item() / labels
    bytes_per_token = windows.token_file.bytes_per_token(windows.split)
    return Evaluation(loss, int(labels), math.exp(min(loss, 700.0)), loss / math.log(2) / bytes_per_token)


def _plan(windows: Windows, num_tokens: int, batch_size: int, sequence_ranks: int) -> Iterator[_Batch]:
    """Batches of whole windows, then the rest; the rest is cut to a multiple of the ranks so that each holds rows."""
    length = windows.sequence_length
    whole, rest = divmod(min(num_tokens, windows.num_rows), length)
    rest -= rest % sequence_ranks
    if whole + rest == 0:
        raise DataError(
            f"the {windows.split} split of {windows.token_file.path} has {windows.num_rows} rows for {sequence_ranks} "
            f"sequence ranks; use a longer text or fewer ranks"
        )
    for first in range(0, whole, batch_size):
        yield _Batch(range(first, min(first + batch_size, whole)), length)
    if rest:
        yield _Batch(range(whole, whole + 1), rest)


def _loss_sum(
    forward: Callable[..., LongNetOutput], windows: Windows, batch: _Batch, mesh: Mesh, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Sum of the losses, and number, of the labelled rows that this rank holds of a batch."""
    shards = Shards.even(batch.rows, mesh.shape.sequence)
    start, stop = shards.window(mesh.sequence_rank)
    tokens, labels = (part.to(device) for part in windows.local(batch.windows, (start, stop)))
    output = forward(tokens, labels, start=start, total_rows=batch.rows)
    assert output.loss_sum is not None
    assert output.num_labels is not None
    return output.loss_sum, output.num_labels
