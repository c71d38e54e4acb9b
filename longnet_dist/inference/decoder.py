"""A Decoder continues several texts at once, each from a row of its own."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from longnet_dist.attention.kernels.registry import takes_triton
from longnet_dist.engine.decoding_run import run_decoding
from longnet_dist.errors import ConfigError
from longnet_dist.model.longnet import LongNet
from longnet_dist.ops.graphs import Graph
from longnet_dist.ops.normed_linear.choice import MOST_ROWS

CHUNK_LENGTH = 16384
"""Tokens of a prompt that are computed at once on a CPU, and at least on a GPU."""
MOST_TOKENS = 2**48  # products of positions with rates and strides stay within int64
_MOST_NUMBERS = 2**31 - 1
"""Of a tensor, which torch's kernels count with 32 bits."""


def prompt_rows(model: LongNet) -> int:
    """Return how many tokens of a prompt are computed at once: on a GPU as many as a quarter of its free memory holds.

    The host plans and launches every layer of every chunk, so that few chunks are fast. Their number is a power of two,
    since segments are multiples of one and those that cross the edge of a chunk cost more.
    """
    weight, config = next(model.parameters()), model.config
    if weight.device.type != "cuda":
        return CHUNK_LENGTH
    allocated, reserved = (read(weight.device) for read in (torch.cuda.memory_allocated, torch.cuda.memory_reserved))
    free = torch.cuda.mem_get_info(weight.device)[0] + reserved - allocated
    # No more than this is alive at once: queries and keys are rotated in float32, and a feed-forward network has its
    # first layer's output, the activation and the norm.
    row_bytes = 64 * config.dim + 4 * config.first_dim * weight.element_size()
    most = min(free // 4 // row_bytes, _MOST_NUMBERS // config.first_dim)
    return max(CHUNK_LENGTH, 1 << int(most).bit_length() - 1)


class Decoder:
    """Compute the next token's logits of up to ``texts`` texts in one pass, in constant time and memory.

    Args:
        model: a causal model of one device, in evaluation mode.
        texts: number of places, each of which holds a text.
        max_rows: the most tokens that a text can have.
        chunk_length: tokens of a prompt that are computed at once; None: see :func:`prompt_rows`.
        allowed: ``(V,)`` bool, the ids that may follow; the logits of all others are ``-inf``. None: all.
        graphs: whether a step is captured once and replayed as a CUDA graph (:class:`~longnet_dist.ops.graphs.Graph`),
            so that the host launches it at once. The logits of a step are overwritten by the next one then. None: on a
            GPU, unless the model is one of transformers, which may read numbers back from the GPU on the way.
        split_keys: whether kernels of our own rotate queries and keys and keep the new rows and, in layers without
            sinks, split the keys of a head over the processors of a GPU. With few texts such kernels also compute the
            blocks of LongNet's own style (:mod:`longnet_dist.engine.decoding_run`). None: where they run.

    Attributes:
        device: of the model.

    Raises:
        ConfigError: a model that cannot continue a text, more rows than can be numbered, positions that cannot span
            ``max_rows``, or ``split_keys`` where the kernels do not run.
    """

    def __init__(
        self,
        model: LongNet,
        texts: int,
        max_rows: int,
        chunk_length: int | None = None,
        allowed: Tensor | None = None,
        graphs: bool | None = None,
        split_keys: bool | None = None,
    ) -> None:
        if not 1 <= max_rows <= MOST_TOKENS:
            raise ConfigError(f"a text must have from 1 to 2^48 tokens at most, not {max_rows}; use fewer")
        self._model, self._chunk_length = model, chunk_length
        self._cache = model.decoding(texts, max_rows)
        weight = next(model.parameters())
        self.device = weight.device
        runs = takes_triton(self.device, weight.dtype)
        split_keys = runs if split_keys is None else split_keys
        if split_keys and not runs:
            raise ConfigError(
                f"split_keys=True needs Triton, and a GPU with bf16, fp16 or fp32, not {weight.dtype} on "
                f"{self.device}; use split_keys=False"
            )
        self._cache.split_keys = split_keys
        if split_keys and texts <= MOST_ROWS:
            for layer in self._cache.layers:
                layer.runner = run_decoding
        if graphs is None:
            graphs = self.device.type == "cuda" and isinstance(model, LongNet)
        self._refused = None if allowed is None else ~allowed.to(self.device)
        self._ids = torch.zeros(texts, 1, dtype=torch.int64, device=self.device)
        # Between two steps texts change in place, in tensors of the cache and in the ids, so a step can be replayed.
        self._step = Graph(self._pass, self._rehearse, self.device) if graphs else self._pass

    @property
    def texts(self) -> int:
        """Return the number of places."""
        return len(self._ids)

    @property
    def max_rows(self) -> int:
        """Return the most tokens that a text can have."""
        return self._cache.max_rows

    def check(self, prompt: Sequence[int], num_tokens: int = 1) -> None:
        """Refuse a prompt that cannot be continued by ``num_tokens`` tokens.

        Raises:
            ConfigError: it is empty, has ids that the model does not have, or would be too long.
        """
        if not prompt:
            raise ConfigError("the prompt is empty; give at least one character")
        last = self._model.config.vocab_size - 1
        if not 0 <= min(prompt) <= max(prompt) <= last:
            raise ConfigError(
                f"the model has ids 0 to {last}, but those of the prompt are {min(prompt)} to {max(prompt)}; give "
                f"another prompt"
            )
        if num_tokens < 1:
            raise ConfigError(f"at least 1 token must be added, not {num_tokens}")
        if len(prompt) + num_tokens > self.max_rows:
            raise ConfigError(
                f"a text can have {self.max_rows:,} tokens, but the prompt has {len(prompt):,} and {num_tokens:,} are "
                f"to be added; use a shorter prompt or fewer tokens"
            )

    @torch.no_grad()
    def load(self, prompt: Sequence[int], places: Sequence[int]) -> None:
        """Let the texts in some places begin with a prompt; its last token is the first that :meth:`step` passes.

        Args:
            prompt: ids, at least one.
            places: numbers below :attr:`texts`, at least one.

        Raises:
            ConfigError: as :meth:`check`.
        """
        self.check(prompt)
        # An array takes a million ids in a tenth of the time that torch needs for a list.
        tokens = torch.frombuffer(array("q", prompt), dtype=torch.int64)[None].to(self.device)
        passed, first = len(prompt) - 1, places[0]
        stream = self._model.stream(self.max_rows)
        for shards in stream.prefill(passed, self._chunk_length or prompt_rows(self._model)):
            self._model(tokens[:, shards.start : shards.stop], stream=stream)
        self._cache.load(first, stream, passed)
        for place in places[1:]:
            self._cache.copy(first, place)
        self._ids[list(places)] = prompt[-1]

    @torch.no_grad()
    def step(self) -> Tensor:
        """Pass the next token of every text, and return its logits ``(texts, V)``."""
        return self._step()

    def _pass(self) -> Tensor:
        logits = self._logits()
        self._cache.advance()
        return logits

    def _logits(self) -> Tensor:
        logits: Tensor = self._model(self._ids, stream=self._cache).logits[:, 0]
        return logits if self._refused is None else logits.masked_fill(self._refused, -torch.inf)

    def _rehearse(self) -> None:
        """Compute the next row without going on: the step writes the same keys and values in the same slots again."""
        self._logits()
        self._cache.forget_places()

    def clear(self, place: int) -> None:
        """Free a place, whose logits mean nothing until another text is loaded."""
        self._cache.clear(place)

    def follow(self, ids: Tensor) -> None:
        """Set the token that :meth:`step` passes next, in every place.

        Args:
            ids: ``(texts,)`` int64.
        """
        self._ids.copy_(ids.view(-1, 1))
