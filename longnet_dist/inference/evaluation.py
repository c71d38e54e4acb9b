"""Loss of a model on the held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longnet_dist.comm.mesh import Mesh
from longnet_dist.comm.reductions import total_over_ranks
from longnet_dist.data.batches import Windows
from longnet_dist.errors import DataError
from longnet_dist.model.longnet import LongNetOutput


@dataclass(frozen=True)
class Evaluation:
    """Say how well a model predicts a text.

    Attributes:
        loss: mean cross-entropy of a token, nats.
        tokens: how many were predicted.
        perplexity: ``exp(loss)``.
        bits_per_byte: bits for each byte of text that the predicted tokens stand for: comparable across tokenizers.
    """

    loss: float
    tokens: int
    perplexity: float
    bits_per_byte: float

    @classmethod
    def of(cls, loss_sum: float, num_labels: int, num_bytes: int) -> Evaluation:
        """Return the means from the sums over all labelled rows.

        Args:
            loss_sum: cross-entropies, nats.
            num_labels: predicted tokens.
            num_bytes: bytes of text that they stand for.

        Raises:
            DataError: no token was predicted.
        """
        if num_labels == 0:
            raise DataError(
                "no token is predicted: every document read has one token, or no answer; evaluate more tokens"
            )
        loss = loss_sum / num_labels
        bits_per_byte = loss_sum / math.log(2) / max(num_bytes, 1)
        return cls(loss, num_labels, math.exp(min(loss, 700.0)), bits_per_byte)


@dataclass(frozen=True)
class _Batch:
    """Windows that one data rank reads at once, the first ``rows`` rows of each."""

    windows: range
    rows: int


def evaluate(
    model: Any,
    windows: Windows,
    num_tokens: int,
    batch_size: int,
    mesh: Mesh,
    device: torch.device,
    chunk_length: int | None = None,
) -> Evaluation:
    """Mean loss over the first ``num_tokens`` rows of a split, cut into windows. Every rank of the world must call.

    Each window starts without context, so the same rows at a longer ``sequence_length`` show what context is worth.

    Args:
        model: a LongNet or a DeepSpeed engine of one, in evaluation mode.
        windows: the split, cut into windows of the context length.
        num_tokens: rows to read; fewer if the split has fewer or a last, shorter window cannot be shared evenly.
        batch_size: windows that a data rank holds at once.
        mesh: the ranks; data ranks take turns with the batches.
        device: of the model.
        chunk_length: rows of a window that all sequence ranks hold together at once, a multiple of their number; all
            if not given.

    Raises:
        DataError: the text has fewer rows than sequence ranks, or the token file changes meanwhile.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    with torch.no_grad():
        for batches in _plan(windows, num_tokens, batch_size, mesh.shape.sequence):
            for first in range(0, len(batches), mesh.shape.data):
                # With ZeRO stage 3 a forward is a collective of all ranks: one without a batch repeats the last.
                number = first + mesh.data_rank
                found = _sums(model, windows, batches[min(number, len(batches) - 1)], chunk_length, device)
                if number < len(batches):
                    sums += found
    # Each sequence rank adds its own rows, so the sum over the world counts every row once.
    loss_sum, num_labels, num_bytes = total_over_ranks(sums).tolist()
    windows.token_file.check_unchanged()
    return Evaluation.of(loss_sum, int(num_labels), int(num_bytes))


def _plan(windows: Windows, num_tokens: int, batch_size: int, sequence_ranks: int) -> Iterator[list[_Batch]]:
    """Batches of whole windows, then the rest; the rest is cut to a multiple of the ranks so that each holds rows."""
    length = windows.sequence_length
    whole, rest = divmod(min(num_tokens, windows.num_positions), length)
    rest -= rest % sequence_ranks
    if whole + rest == 0:
        raise DataError(
            f"the {windows.split} split of {windows.token_file.path} has {windows.num_positions} rows for "
            f"{sequence_ranks} sequence ranks; use a longer text or fewer ranks"
        )
    yield [_Batch(range(first, min(first + batch_size, whole)), length) for first in range(0, whole, batch_size)]
    if rest:
        yield [_Batch(range(whole, whole + 1), rest)]


def _sums(model: Any, windows: Windows, batch: _Batch, chunk_length: int | None, device: torch.device) -> Tensor:
    """Return loss sum, number and bytes of the labels that this rank holds of a batch: ``(3,)`` float64."""
    documents = windows.documents_of(batch.windows, batch.rows)
    # Windows with documents of their own are one sequence, one window behind the other.
    joined = 1 if documents is None else len(batch.windows)
    stream = model.stream(batch.rows * joined, cu_seqlens=documents)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for shards in stream.forward((chunk_length or batch.rows) * joined):
        tokens, labels = windows.local(batch.windows, shards.window(stream.rank))
        sums += loss_sums(model(tokens.to(device), labels.to(device), stream=stream), windows.num_bytes(labels))
    return sums


def loss_sums(output: LongNetOutput, *known: int) -> Tensor:
    """Return loss sum and number of the labels of an output, then ``known`` numbers of the host: float64.

    The host does not wait for the device.
    """
    assert output.loss_sum is not None
    assert output.num_labels is not None
    numbers = torch.tensor(known, dtype=torch.float64, pin_memory=output.loss_sum.is_cuda)
    sums = torch.stack([output.loss_sum.double(), output.num_labels.double()])
    return torch.cat([sums, numbers.to(sums.device, non_blocking=True)])
