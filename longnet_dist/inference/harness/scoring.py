"""Log-likelihoods of continuations, each given its context, of any length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longnet_dist.errors import ConfigError
from longnet_dist.inference.decoder import CHUNK_LENGTH
from longnet_dist.model.longnet import LongNet
from longnet_dist.numerics import wide_dtype

_LOGITS = 2**26
"""Logits that exist at once."""


class Continuation(NamedTuple):
    """Hold the ids of a context, at least one, and of what follows it."""

    context: list[int]
    ids: list[int]


class Score(NamedTuple):
    """Say how likely a continuation is.

    Attributes:
        log_likelihood: sum of the logarithms of the probabilities of its ids, nats.
        greedy: whether each of them is the likeliest.
    """

    log_likelihood: float
    greedy: bool


@torch.no_grad()
def score(model: LongNet, continuations: Sequence[Continuation], chunk_length: int = CHUNK_LENGTH) -> Iterator[Score]:
    """Yield the score of each continuation, in their order.

    Short ones are packed into one sequence of at most ``chunk_length`` tokens, in which each is a document. A longer
    one passes as a stream of chunks. Kinds of attention that need whole sequences compute each text alone and whole.

    Args:
        model: causal, on one device, in evaluation mode.
        continuations: with a context of at least one id each. One without ids has the log-likelihood 0.
        chunk_length: tokens that are computed at once.

    Raises:
        ConfigError: a bidirectional model, an empty context, or ids that the model does not have.
    """
    if not model.config.causal:
        raise ConfigError(
            "a bidirectional model sees the tokens that it would have to predict, and this one has "
            "model.causal=false; score a causal model"
        )
    vocab = model.config.vocab_size
    for context, ids in continuations:
        if not context or not 0 <= min(context + ids) <= max(context + ids) < vocab:
            raise ConfigError(
                f"a continuation has a context of ids 0 to {vocab - 1} and ids of its own, but one has "
                f"{context[:8]}… and {ids[:8]}…; use the tokenizer that the model was trained with"
            )
    whole = model.config.needs_whole_sequences
    for batch in _batches(continuations, chunk_length, alone=whole):
        if not whole and len(batch[0].context) + len(batch[0].ids) - 1 > chunk_length:
            yield _streamed(model, batch[0], chunk_length)
        else:
            yield from _packed(model, batch)


def _batches(continuations: Sequence[Continuation], most: int, alone: bool) -> Iterator[list[Continuation]]:
    """Yield as many neighbours together as have at most ``most`` tokens; longer ones alone."""
    batch: list[Continuation] = []
    rows = 0
    for continuation in continuations:
        own = len(continuation.context) + len(continuation.ids) - 1
        if batch and (alone or rows + own > most):
            yield batch
            batch, rows = [], 0
        batch.append(continuation)
        rows += own
    if batch:
        yield batch


def _packed(model: LongNet, batch: list[Continuation]) -> Iterator[Score]:
    """Yield the scores of continuations that are computed in one pass."""
    device = model.embedding.weight.device
    rows = [(context + ids)[:-1] or context for context, ids in batch]
    edges = [0]
    for tokens in rows:
        edges.append(edges[-1] + len(tokens))
    packed = torch.tensor([[token for tokens in rows for token in tokens]], device=device)
    last = model(packed, cu_seqlens=edges if len(batch) > 1 else None, head=False).last_hidden_state
    for start, (context, ids) in zip(edges, batch, strict=False):
        first = start + len(context) - 1
        yield _of_rows(model, last[0, first : first + len(ids)], ids)


def _streamed(model: LongNet, continuation: Continuation, chunk_length: int) -> Score:
    """Return the score of a continuation that passes in chunks."""
    context, ids = continuation
    tokens = torch.tensor([(context + ids)[:-1]], device=model.embedding.weight.device)
    before, total, greedy = len(context) - 1, 0.0, True  # rows that predict nothing
    stream = model.stream(tokens.shape[1])
    for shards in stream.forward(chunk_length):
        last = model(tokens[:, shards.start : shards.stop], stream=stream, head=False).last_hidden_state
        row = max(shards.start, before)
        part = _of_rows(model, last[0, row - shards.start :], ids[row - before : max(0, shards.stop - before)])
        total, greedy = total + part.log_likelihood, greedy and part.greedy
    return Score(total, greedy)


def _of_rows(model: LongNet, states: Tensor, ids: list[int]) -> Score:
    """Return the score of ids that states ``(n, E)`` predict; few logits exist at a time."""
    total, greedy = 0.0, True
    labels = torch.tensor(ids, dtype=torch.int64, device=states.device)
    rows = max(1, _LOGITS // model.config.vocab_size)
    for part, label in zip(torch.split(states, rows), torch.split(labels, rows), strict=True):
        logits = model.head(part[None])[0]
        chances = logits.to(wide_dtype(logits.dtype)).log_softmax(-1).gather(1, label[:, None])
        total += chances.double().sum().item()
        greedy = greedy and bool((logits.argmax(-1) == label).all())
    return Score(total, greedy)
