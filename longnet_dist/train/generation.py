"""Continuing a text, one token after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longnet_dist.errors import ConfigError
from longnet_dist.model.longnet import LongNet


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
def generate(model: LongNet, prompt: Sequence[int], num_tokens: int, context: int, sampling: Sampling) -> Iterator[int]:
    """Yield ``num_tokens`` ids that continue ``prompt``.

    Each token costs a forward over the last ``context`` ids, so it is drawn from exactly what training would compute
    for a sequence of these ids.

    Args:
        model: a causal model of one device, in evaluation mode.
        prompt: ids, at least one.
        num_tokens: how many to add.
        context: ids that the model sees at most.
        sampling: how to draw.

    Raises:
        ConfigError: a bidirectional model, or an empty prompt.
    """
    if not model.config.causal:
        raise ConfigError("only a causal model can continue a text, but this one has model.causal=false")
    if not prompt:
        raise ConfigError("the prompt is empty; give at least one character")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    ids = list(prompt)
    for _ in range(num_tokens):
        tokens = torch.tensor([ids[-context:]], device=device)
        ids.append(_draw(model(tokens).logits[0, -1].float(), sampling, generator))
        yield ids[-1]


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id from logits ``(V,)``."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    values, ids = logits.topk(min(sampling.top_k or len(logits), len(logits)))
    choice = torch.multinomial((values / sampling.temperature).softmax(-1), 1, generator=generator)
    return int(ids[choice])
