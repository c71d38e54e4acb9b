"""The cache of a LongNet for ``generate``: the kept rows of open segments, however long the texts are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from longnet_dist.attention.decoding import Decoding
from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.geometry.chunks import chunks_of
from longnet_dist.model.longnet import LongNet

CHUNK_LENGTH = 16384
"""Tokens of a prompt that are computed at once."""


class LongNetCache(Cache):  # type: ignore[misc]
    """Keep what the next tokens of some texts attend to: ``Σ ⌈w/r⌉`` keys and values a head and layer.

    ``generate`` makes one unless it is given one. Texts of a batch may begin in different columns (padding on the
    left); each counts its own tokens.

    Args:
        max_rows: the most tokens that a text can have. Memory grows with it only up to the longest segment.

    Attributes:
        decoding: the rows of all texts; None before the first call.
        seen: columns of the batch so far.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = ()

    def __init__(self, max_rows: int) -> None:
        if max_rows < 1:
            raise ConfigError(f"a cache is for texts of at least 1 token, not {max_rows}")
        super().__init__(layers=[])
        self.max_rows, self.seen = max_rows, 0
        self.decoding: Decoding | None = None

    @torch.no_grad()
    def advance(self, model: LongNet, batch: dict[str, Tensor], mask: Tensor | None, hidden: bool) -> list[Tensor]:
        """Pass the next columns of a batch through the model, and keep what later ones attend to.

        Args:
            model: in evaluation mode.
            batch: ``tokens (B, n)`` or ``inputs_embeds (B, n, E)``.
            mask: ``(B, n)`` of the first columns, true for tokens; padding comes first. Later columns are tokens.
            hidden: whether the hidden states of all layers are returned too.

        Returns:
            ``last_hidden_state (B, n, E)`` and, if asked for, the hidden states. Rows of padding are 0.

        Raises:
            ConfigError: a text would be longer than ``max_rows``, or the model cannot continue a text.
            ShapeError: another number of texts than before, or a mask with padding behind tokens.
        """
        ((name, rows),) = batch.items()
        texts, columns = rows.shape[:2]
        if self.seen + columns > self.max_rows:
            raise ConfigError(
                f"the cache is for texts of {self.max_rows:,} tokens, but this one would have "
                f"{self.seen + columns:,}; use LongNetCache(max_rows=…)"
            )
        if self.decoding is None:
            self.decoding = model.decoding(texts, self.max_rows)
            parts = self._prefill(model, name, rows, _starts(mask, texts, columns), self.decoding, hidden)
        else:
            if texts != len(self.decoding.rows):
                raise ShapeError(f"the cache has {len(self.decoding.rows)} texts, but {texts} came; use a new cache")
            steps = []
            for column in range(columns):
                out = model(
                    **{name: rows[:, column : column + 1]}, stream=self.decoding, hidden_states=hidden, head=False
                )
                steps.append([out.last_hidden_state, *(out.hidden_states or ())])
                self.decoding.advance()
            parts = [torch.cat(column, 1) for column in zip(*steps, strict=True)]
        self.seen += columns
        return parts

    def _prefill(
        self, model: LongNet, name: str, rows: Tensor, starts: list[int], decoding: Decoding, hidden: bool
    ) -> list[Tensor]:
        """Pass the first columns, those texts together that begin in one column."""
        found: list[Tensor] = []
        for start in sorted(set(starts)):
            items = [item for item, first in enumerate(starts) if first == start]
            own, stream, pieces = rows[items, start:], model.stream(self.max_rows), []
            for shards in chunks_of(self.max_rows, CHUNK_LENGTH, 1, 0, own.shape[1]):
                stream.enter(shards)
                piece = own[:, shards.start : shards.stop]
                out = model(**{name: piece}, stream=stream, hidden_states=hidden, head=False)
                pieces.append([out.last_hidden_state, *(out.hidden_states or ())])
            parts = [torch.cat(part, 1) for part in zip(*pieces, strict=True)]
            found = found or [part.new_zeros(*rows.shape[:2], part.shape[2]) for part in parts]
            for whole, part in zip(found, parts, strict=True):
                whole[items, start:] = part
            for number, item in enumerate(items):
                decoding.load(item, stream, own.shape[1], number)
        return found

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns so far, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the columns so far with those that come, and 0: masks count all columns."""
        return self.seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the most tokens that a text can have."""
        return self.max_rows

    def reset(self) -> None:
        """Forget all texts."""
        self.decoding, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each text go on from another."""
        if self.decoding is not None:
            self.decoding.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every text."""
        if self.decoding is not None:
            rows = self.decoding.rows
            self.decoding.reorder(torch.arange(len(rows), device=rows.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some texts."""
        self.reorder_cache(indices)

    def crop(self, *arguments: Any) -> None:
        """Raise ConfigError: what a segment has dropped does not come back."""
        raise ConfigError("the cache of a LongNet keeps open segments alone and cannot take tokens back")


def _starts(mask: Tensor | None, texts: int, columns: int) -> list[int]:
    """Return the column in which each text begins."""
    if mask is None:
        return [0] * texts
    kept = mask != 0
    starts = (columns - kept.sum(1)).tolist()
    if not torch.equal(
        kept, torch.arange(columns, device=mask.device) >= torch.tensor(starts, device=mask.device)[:, None]
    ):
        raise ShapeError(
            "texts to be continued have their padding on the left, but the mask has padding behind a token; use "
            "padding_side='left'"
        )
    if max(starts) == columns:
        raise ShapeError(f"item {starts.index(columns)} has no token; leave it out")
    return starts
