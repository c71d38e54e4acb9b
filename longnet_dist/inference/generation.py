"""Continuing a text, one token after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longnet_dist.errors import ConfigError
from longnet_dist.model.longnet import LongNet

CHUNK_LENGTH = 16384


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only this many of the most likely tokens; 0: all.
        seed: of the draws.

    Raises:
        ConfigError: a negative value.
    """

    temperature: float = 0.8
    top_k: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or self.seed < 0:
            raise ConfigError(
                f"temperature, top-k and seed must not be negative, but are {self.temperature}, {self.top_k} and "
                f"{self.seed}; use temperature 0 for the most likely token and top-k 0 for all"
            )


@torch.no_grad()
def generate(
    model: LongNet,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    sampling: Sampling,
    *,
    samples: int = 1,
    chunk_length: int = CHUNK_LENGTH,
) -> Iterator[list[int]]:
    """Yield ``num_tokens`` times the next id of every text that continues one of the ``prompts``.

    The prompts pass in chunks; then each token passes alone. It attends to the rows that every layer caches, at most
    ``Σ w/r`` a head, so that its time and memory do not grow with the text, whose length has no limit. It is drawn from
    exactly what a forward over the whole text would compute.

    Args:
        model: a causal model of one device, in evaluation mode.
        prompts: texts of equally many ids, at least one.
        num_tokens: how many to add to each.
        sampling: how to draw.
        samples: texts that continue each prompt; they stand next to each other in what is yielded.
        chunk_length: rows of the prompts that are computed at once.

    Raises:
        ConfigError: a bidirectional model, empty prompts or of different lengths, fewer than one sample, or a text
            that xPos cannot span.
    """
    _check(model, prompts, samples)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    tokens = torch.tensor(prompts, device=device)
    first = tokens.shape[1] - 1  # the last of the prompt is the first whose logits are needed
    stream = model.stream(first + num_tokens)
    for shards in stream.prefill(first, chunk_length):
        model(tokens[:, shards.start : shards.stop], stream=stream)
    if samples > 1:
        prefilled, stream = stream, model.stream(first + num_tokens)
        stream.resume(first, [records.repeat_interleave(samples, 1) for records in prefilled.carried()])
    ids = tokens[:, -1].repeat_interleave(samples)
    for _ in stream.forward(1):
        logits = model(ids[:, None], stream=stream).logits
        assert logits is not None
        ids = _draw(logits[:, 0].float(), sampling, generator)
        yield ids.tolist()


def _check(model: LongNet, prompts: Sequence[Sequence[int]], samples: int) -> None:
    if not model.config.causal:
        raise ConfigError("only a causal model can continue a text, but this one has model.causal=false")
    lengths = {len(prompt) for prompt in prompts}
    if lengths in (set(), {0}):
        raise ConfigError("the prompt is empty; give at least one character")
    if len(lengths) > 1:
        raise ConfigError(f"prompts of one batch must have equally many tokens, but have {sorted(lengths)}")
    if samples < 1:
        raise ConfigError(f"there must be at least 1 sample, not {samples}")


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One id ``(B,)`` from each row of logits ``(B, V)``."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    values, ids = logits.topk(min(sampling.top_k or logits.shape[-1], logits.shape[-1]))
    choice = torch.multinomial((values / sampling.temperature).softmax(-1), 1, generator=generator)
    return ids.gather(1, choice)[:, 0]
