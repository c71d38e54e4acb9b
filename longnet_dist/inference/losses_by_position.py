"""The loss of parts of a sequence: by position, and behind prompts of several lengths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from longnet_dist.data.batches import Windows
from longnet_dist.errors import ConfigError, DataError
from longnet_dist.geometry.window import Shards
from longnet_dist.model.longnet import LongNet, LongNetOutput
from longnet_dist.model.loss import IGNORE_INDEX


def losses_by_position(
    model: LongNet, windows: Windows, edges: Sequence[int], num_windows: int, device: torch.device
) -> list[float]:
    """Return the mean loss, nats, of the positions between neighbouring edges, over the first windows of a split.

    Args:
        model: on one device, in evaluation mode.
        windows: the split, in windows of at least ``edges[-1]`` tokens.
        edges: positions in a window, ascending from 0.
        num_windows: windows to read; fewer if the split has fewer.
        device: of the model.

    Raises:
        ConfigError: the windows keep documents apart.
        DataError: the split has no whole window.
    """
    _refuse_documents(windows)
    count = min(num_windows, windows.num_full)
    if count < 1:
        raise DataError(
            f"the {windows.split} split of {windows.token_file.path} has {windows.num_positions + 1} tokens, but a "
            f"window of {windows.sequence_length} needs one more than that; use a longer text or shorter windows"
        )
    sums = torch.zeros(len(edges) - 1, 2, dtype=torch.float64, device=device)
    for index in range(count):
        tokens, labels = (part.to(device) for part in windows.local([index], (0, edges[-1])))
        sums += _sums(model, tokens, labels, edges)
    return (sums[:, 0] / sums[:, 1]).tolist()


def losses_after_prompts(
    model: LongNet, windows: Windows, prompts: Sequence[int], num_tokens: int, num_windows: int, device: torch.device
) -> list[float]:
    """Return the mean loss, nats, of the same tokens behind prompts of several lengths.

    The last ``num_tokens`` tokens of each window are predicted, given the ``prompt`` tokens before them.

    Args:
        model: on one device, in evaluation mode.
        windows: the split, in windows of at least ``max(prompts) + num_tokens - 1`` positions.
        prompts: numbers of tokens, at least 1.
        num_tokens: tokens to predict.
        num_windows: windows to read; fewer if the split has fewer.
        device: of the model.

    Raises:
        ConfigError: the windows keep documents apart.
        DataError: the split has no whole window, or its windows are shorter than a prompt with its tokens.
    """
    _refuse_documents(windows)
    length, count = windows.sequence_length, min(num_windows, windows.num_full)
    if count < 1 or max(prompts) + num_tokens - 1 > length or min(prompts) < 1:
        raise DataError(
            f"prompts of {list(prompts)} tokens and {num_tokens} more need whole windows of "
            f"{max(prompts) + num_tokens - 1}, but the {windows.split} split has {windows.num_full} of {length}; use a "
            f"longer text or shorter prompts"
        )
    sums = torch.zeros(len(prompts), 2, dtype=torch.float64, device=device)
    for index in range(count):
        for number, prompt in enumerate(prompts):
            # A label is the next token, so the last token of the prompt predicts the first one behind it.
            first = length - num_tokens - prompt + 1
            tokens, labels = (part.to(device) for part in windows.local([index], (first, length)))
            edges = [prompt - 1, tokens.shape[1]]
            sums[number] += _sums(model, tokens, labels, edges)[0]
    return (sums[:, 0] / sums[:, 1]).tolist()


def _sums(model: LongNet, tokens: Tensor, labels: Tensor, edges: Sequence[int]) -> Tensor:
    """Return the sum of the losses, and the number, of the labels between neighbouring edges, ``(parts, 2)``."""
    with torch.no_grad():
        if model.config.needs_whole_sequences:
            return torch.stack([_sums_of_whole(model, tokens, labels, *part) for part in pairwise(edges)])
        stream, found = model.stream(tokens.shape[1]), []
        for start, stop in pairwise([0, *edges] if edges[0] else edges):
            stream.recording = stop <= edges[0]
            shards = Shards.even(stream.total_rows, 1, start, stop)
            stream.enter(shards)
            output = model(tokens[:, start:stop], labels[:, start:stop], stream=stream)
            if not stream.recording:
                found.append(_sums_of_labels(output))
        return torch.stack(found)


def _sums_of_whole(model: LongNet, tokens: Tensor, labels: Tensor, start: int, stop: int) -> Tensor:
    """Return the same of one part, of a sequence that cannot pass in chunks."""
    asked = torch.full_like(labels, IGNORE_INDEX)
    asked[:, start:stop] = labels[:, start:stop]
    return _sums_of_labels(model(tokens, asked))


def _sums_of_labels(output: LongNetOutput) -> Tensor:
    """Return the sum of the losses, and the number, of an output's labels, ``(2,)`` float64."""
    assert output.loss_sum is not None
    assert output.num_labels is not None
    return torch.stack([output.loss_sum.double(), output.num_labels.double()])


def _refuse_documents(windows: Windows) -> None:
    if windows.documents:
        raise ConfigError(
            "the loss by position is that of texts in which documents see each other, but the run has "
            "data.documents=true; measure a run with data.documents=false"
        )
