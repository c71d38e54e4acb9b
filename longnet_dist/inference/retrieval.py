"""How often a model finds what stands far back: tasks by length and depth, streamed for long texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from longnet_dist.data.tasks import Sample, make_sample
from longnet_dist.errors import ConfigError
from longnet_dist.model.longnet import LongNet

SEED = 1
"""Samples for tests have another seed than those for training, whose seed is 0."""


@dataclass(frozen=True)
class Retrieval:
    """The result of a task at one length and depth.

    Attributes:
        task: name of the task.
        length: tokens of a sample.
        depth: where the model must look, from 0 (the beginning) to 1 (just before the question).
        samples: number of samples.
        solved: samples of which the model predicted every answer token.
        tokens_right: share of the answer tokens that it predicted.
    """

    task: str
    length: int
    depth: float
    samples: int
    solved: int
    tokens_right: float

    @property
    def accuracy(self) -> float:
        """Return the share of the samples that were solved."""
        return self.solved / self.samples


def evaluate_retrieval(
    model: LongNet, task: str, length: int, depth: float, samples: int, chunk_length: int, device: torch.device
) -> Retrieval:
    """Let a model solve samples of a task; it sees each text once, and its most probable next token counts.

    Args:
        model: a causal model of bytes on one device, in evaluation mode.
        task: name of a task of ``data/tasks``.
        length: tokens of a sample.
        depth: from 0 to 1.
        samples: number of samples.
        chunk_length: tokens that are computed at once. Kinds of attention that need whole sequences get them.
        device: of the model.

    Raises:
        ConfigError: a model that is bidirectional or has fewer ids than bytes; an unknown task, or too few tokens for
            it.
    """
    if not model.config.causal or model.config.vocab_size < 256 or samples < 1:
        raise ConfigError(
            f"tasks are texts of bytes that a causal model continues, but causal is {model.config.causal}, the "
            f"vocabulary has {model.config.vocab_size} ids and {samples} samples were asked for; use a causal model "
            f"with 256 ids or more"
        )
    if model.config.needs_whole_sequences:
        chunk_length = length
    solved = right = answers = 0
    for number in range(samples):
        sample = make_sample(task, SEED, number, length, depth)
        found = _predicted(model, sample, chunk_length, device)
        solved += found == len(sample.answers)
        right += found
        answers += len(sample.answers)
    return Retrieval(task, length, depth, samples, solved, right / answers)


def _predicted(model: LongNet, sample: Sample, chunk_length: int, device: torch.device) -> int:
    """Return how many answer tokens are the model's most probable next token."""
    tokens, found = sample.tokens, 0
    places = np.array(sample.answers) - 1  # the token before an answer predicts it
    # The last token predicts nothing that is asked.
    stream = model.stream(len(tokens) - 1)
    with torch.no_grad():
        for shards in stream.chunks(chunk_length):
            inside = places[(places >= shards.start) & (places < shards.stop)]
            stream.recording = inside.size == 0
            stream.enter(shards)
            ids = torch.from_numpy(tokens[shards.start : shards.stop]).to(device)[None]
            output = model(ids, stream=stream)
            if stream.recording:
                continue
            logits = output.logits[0, torch.from_numpy(inside - shards.start).to(device)]
            found += int((logits.argmax(-1).cpu().numpy() == tokens[inside + 1]).sum())
    return found


def grid_of(results: Sequence[Retrieval]) -> tuple[list[int], list[float], list[list[float]]]:
    """Return the lengths, the depths, and the accuracy at each ``[depth][length]`` of one task."""
    lengths, depths = sorted({x.length for x in results}), sorted({x.depth for x in results})
    by_place = {(x.depth, x.length): x.accuracy for x in results}
    return lengths, depths, [[by_place.get((depth, length), float("nan")) for length in lengths] for depth in depths]
