"""Continuing a text, one token after the other; the ids become text as they come."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longnet_dist.data.tokenizers import Tokenizer
from longnet_dist.errors import ConfigError
from longnet_dist.inference.decoder import MOST_TOKENS, Decoder
from longnet_dist.model.longnet import LongNet

LEAST_TEMPERATURE = 1e-6  # logits that are divided by it are far from the end of float32
NUM_SEEDS = 2**64  # of torch's generators
_CONTEXT = 8  # ids of the prompt that a stream decodes before new ones
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Sampling:
    """Say how the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only this many of the most likely tokens; 0: all.
        seed: of the draws.
        top_p: only the most likely tokens that together have this probability, in (0, 1]; the first that reaches it is
            one of them. It counts among those that ``top_k`` leaves.

    Raises:
        ConfigError: a negative value, a temperature that is not finite or too small to divide by, a seed that is too
            large, or a top-p outside of its range.
    """

    temperature: float = 0.8
    top_k: int = 40
    seed: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or 0 < self.temperature < LEAST_TEMPERATURE:
            raise ConfigError(
                f"the temperature must be 0 or from {LEAST_TEMPERATURE:g} upwards and finite, not {self.temperature}; "
                "use 0 for the most likely token"
            )
        if self.seed >= NUM_SEEDS:
            raise ConfigError(f"the seed must be less than 2^64, not {self.seed}; use a smaller one")
        if self.temperature < 0 or self.top_k < 0 or self.seed < 0:
            raise ConfigError(
                f"temperature, top-k and seed must not be negative, but are {self.temperature}, {self.top_k} and "
                f"{self.seed}; use temperature 0 for the most likely token and top-k 0 for all"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p must be above 0 and at most 1, but is {self.top_p}; use 1 for all tokens")

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the source of the draws."""
        return torch.Generator(device).manual_seed(self.seed)


def generate(
    model: LongNet,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    sampling: Sampling,
    *,
    samples: int = 1,
    chunk_length: int | None = None,
    allowed: Tensor | None = None,
) -> Iterator[list[int]]:
    """Yield ``num_tokens`` times the next id of every text that continues one of the ``prompts``.

    Each prompt passes in chunks; then the next tokens of all texts pass together, each text at its own row. A token
    attends to the rows that every layer caches, at most ``Σ w/r`` a head, so that its time and memory do not grow with
    the text. It is drawn from exactly what a forward over its whole text would compute.

    Args:
        model: a causal model of one device, in evaluation mode.
        prompts: texts of any lengths, each of at least one id.
        num_tokens: how many to add to each.
        sampling: how to draw.
        samples: texts that continue each prompt; they stand next to each other in what is yielded.
        chunk_length: rows of a prompt that are computed at once; None: as
            :func:`~longnet_dist.inference.decoder.prompt_rows` says.
        allowed: ``(V,)`` bool, the ids that may be drawn; None: all.

    Raises:
        ConfigError: a bidirectional model, no prompt or an empty one, fewer than one sample, an impossible number of
            tokens, or a text that xPos cannot span.
    """
    if samples < 1:
        raise ConfigError(f"there must be at least 1 sample, not {samples}")
    if not 0 <= num_tokens <= MOST_TOKENS:
        raise ConfigError(f"the number of tokens to add must be from 0 to 2^48, not {num_tokens}")
    if not prompts:
        raise ConfigError("the prompt is empty; give at least one character")
    if not num_tokens:
        return iter(())
    decoder = Decoder(model, samples * len(prompts), max(map(len, prompts)) + num_tokens, chunk_length, allowed)
    for prompt in prompts:
        decoder.check(prompt, num_tokens)
    return _generate(decoder, prompts, num_tokens, sampling, samples)


@torch.no_grad()
def _generate(
    decoder: Decoder, prompts: Sequence[Sequence[int]], num_tokens: int, sampling: Sampling, samples: int
) -> Iterator[list[int]]:
    """Yield as :func:`generate` does, for arguments that it has checked."""
    for number, prompt in enumerate(prompts):
        decoder.load(prompt, range(samples * number, samples * (number + 1)))
    generator = sampling.generator(decoder.device)
    for _ in range(num_tokens):
        ids = draw(decoder.step().float(), sampling, generator)
        decoder.follow(ids)
        yield ids.tolist()


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Return one id ``(B,)``, int64, from each row of float logits ``(B, V)``."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    values, ids = logits.topk(min(sampling.top_k or logits.shape[-1], logits.shape[-1]))
    shares = (values / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:  # a token stays while those before it do not have that probability yet
        shares = shares.masked_fill(shares.cumsum(-1) - shares >= sampling.top_p, 0.0)
    choice = torch.multinomial(shares, 1, generator=generator)
    return ids.gather(1, choice)[:, 0]


class TextStream:
    """Give out the text of ids that come one by one: whole characters alone, and nothing from a stop string on.

    A character can be spread over several ids, and a stop string over several texts; both are held back until it is
    clear what they are.

    Args:
        tokenizer: of the ids.
        prompt: ids that came before. A tokenizer may write the first id of a text in another way than later ones.
        stop: texts that end the stream.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(text for text in stop if text)
        # New ids are decoded behind those that were given out last, and only what they add is new.
        self._context, self._new = list(prompt[-_CONTEXT:]), list[int]()
        self._held = ""
        self.stopped = False

    def push(self, new: int) -> str:
        """Return the text that is certain now that an id has come; empty once the stream has stopped."""
        if self.stopped:
            return ""
        self._new.append(new)
        added = self._added()
        if added.endswith(_UNKNOWN):  # perhaps the first bytes of a character
            return ""
        self._context, self._new = self._new, []
        return self._without_stop(added)

    def finish(self) -> str:
        """Return what was held back, after the last id."""
        if self.stopped:
            return ""
        certain = self._without_stop(self._added())
        held, self._held, self._new = self._held, "", []
        return certain if self.stopped else certain + held

    def _added(self) -> str:
        """Return what the new ids add to the text of those before them."""
        return self._decode(self._context + self._new)[len(self._decode(self._context)) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids).decode("utf-8", errors="replace") if ids else ""

    def _without_stop(self, added: str) -> str:
        """Return what is certain of the held text and ``added``, up to the first stop string."""
        text = self._held + added
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        begun = (length for stop in self._stop for length in range(1, len(stop)) if text.endswith(stop[:length]))
        certain = len(text) - max(begun, default=0)
        self._held = text[certain:]
        return text[:certain]
