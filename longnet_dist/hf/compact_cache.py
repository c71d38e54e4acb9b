"""A cache for generation that keeps only the keys of open segments: ``Σ ⌈w/r⌉`` a head, however long the text is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.hf.operator import attend_documents
from longnet_dist.hf.pattern_field import pattern_of
from longnet_dist.numerics import wide_dtype

_LAYER = "_longnet_dist_layer"
"""Attribute of keys that a compact cache returns: its layer."""


class CompactCache(Cache):  # type: ignore[misc]
    """Keep what later tokens of a causal model can attend to.

    ::

        model.generate(tokens, cache=CompactCache(model.config))

    A token attends to earlier ones of its own segments, at rows that its head keeps. So of each branch a layer keeps
    the rows of the segment that is open: ``⌈w/r⌉`` keys and values a head.

    Args:
        config: of a model that was dilated.

    Raises:
        ConfigError: the configuration has no pattern.
    """

    def __init__(self, config: Any) -> None:
        text = config.get_text_config()
        pattern = pattern_of(text)
        super().__init__(layers=[CompactLayer(pattern) for _ in range(text.num_hidden_layers)])


class CompactLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keep the open segments of one layer.

    Args:
        pattern: the branches.

    Attributes:
        keys, values: ``(B, Hkv, R, D)``, the branches one behind the other.
        valid: ``(B, Hkv, R)`` bool, which of these rows are filled.
    """

    is_sliding = False

    def __init__(self, pattern: DilatedPattern) -> None:
        super().__init__()
        self.pattern, self.seen = pattern, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.sizes = [-(-branch.segment_length // branch.dilation_rate) for branch in pattern]
        self.valid: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the rows for keys and values ``(B, Hkv, n, D)``."""
        batch, heads, _, _ = key_states.shape
        rows = sum(self.sizes)
        self.keys = key_states.new_zeros(batch, heads, rows, key_states.shape[3])
        self.values = value_states.new_zeros(batch, heads, rows, value_states.shape[3])
        self.valid = torch.zeros(batch, heads, rows, dtype=torch.bool, device=key_states.device)
        self.device, self.is_initialized = key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys and values, which lead the attention to this layer; :meth:`attend` keeps them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        setattr(key_states, _LAYER, self)
        return key_states, value_states

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, sink: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Return the attention ``(B, n, H, D)`` of the newest tokens, and keep their keys and values.

        Args:
            q: ``(B, H, n, D)``.
            k, v: ``(B, Hkv, n, D)``, after :meth:`update`.
            scale: factor of the scores, ``D ** -0.5`` if not given.
            sink: ``(H,)``.
            mask: ``(B, seen)``, true for tokens; padding comes first.

        Raises:
            ShapeError: padding behind a token.
        """
        rows = k.shape[2]
        start = torch.zeros(len(k), dtype=torch.int64, device=k.device) if mask is None else (mask != 0).int().argmax(1)
        if self.seen == rows:
            if mask is not None and not bool((mask[:, -1] != 0).all()):
                raise ShapeError(
                    "texts to be continued have their padding on the left, but the mask has padding behind a token; "
                    "use padding_side='left'"
                )
            out = attend_documents(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                self.pattern,
                causal=True,
                scale=scale,
                sink=sink,
                mask=mask,
                position_ids=None,
                cu_seqlens=None,
            )
            self._fill(k, v, start)
            return out
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        steps = [
            self._step(q[:, :, row], k[:, :, row], v[:, :, row], self.seen - rows + row - start, factor, sink)
            for row in range(rows)
        ]
        return torch.stack(steps, 1)

    def _fill(self, k: Tensor, v: Tensor, start: Tensor) -> None:
        """Keep the open segments of the first tokens."""
        assert self.keys is not None
        assert self.values is not None
        assert self.valid is not None
        newest = k.shape[2] - 1 - start  # (B,), counted from the first token of each item
        for number, (part, size) in enumerate(zip(self._parts(), self.sizes, strict=True)):
            first = self._segment_start(number, newest)[:, None, None]
            place = torch.arange(size, device=k.device) * self._rate(number) + self._offsets(number, k)[:, None]
            row = first + place  # (B, Hkv, size)
            self.valid[:, :, part] = row <= newest[:, None, None]
            index = (row + start[:, None, None]).clamp(max=k.shape[2] - 1)[..., None]
            self.keys[:, :, part] = k.gather(2, index.expand(-1, -1, -1, k.shape[3]))
            self.values[:, :, part] = v.gather(2, index.expand(-1, -1, -1, v.shape[3]))

    def _step(self, q: Tensor, k: Tensor, v: Tensor, row: Tensor, scale: float, sink: Tensor | None) -> Tensor:
        """Keep one token, ``k, v (B, Hkv, D)`` at rows ``(B,)``, and return its attention ``(B, H, D)``."""
        assert self.keys is not None
        assert self.values is not None
        assert self.valid is not None
        visible = torch.zeros_like(self.valid)
        for number, part in enumerate(self._parts()):
            place = row - self._segment_start(number, row)  # in the segment
            self.valid[:, :, part] &= (place > 0)[:, None, None]  # a segment that begins is empty
            away = place[:, None] - self._offsets(number, k)
            kept = (away >= 0) & (away % self._rate(number) == 0)  # (B, Hkv)
            slots = torch.arange(self.sizes[number], device=k.device)
            here = kept[..., None] & (slots == (away // self._rate(number))[..., None])
            self.keys[:, :, part] = torch.where(here[..., None], k[:, :, None], self.keys[:, :, part])
            self.values[:, :, part] = torch.where(here[..., None], v[:, :, None], self.values[:, :, part])
            self.valid[:, :, part] |= here
            visible[:, :, part] = self.valid[:, :, part] & kept[..., None]
        wide = wide_dtype(q.dtype)
        grouped = torch.unflatten(q.to(wide), 1, (k.shape[1], -1))  # (B, Hkv, G, D)
        scores = torch.einsum("bhgd,bhrd->bhgr", grouped, self.keys.to(wide)) * scale
        scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
        if sink is not None:
            sinks = sink.to(wide).view(1, k.shape[1], -1, 1).expand(len(q), -1, -1, 1)
            scores = torch.cat([scores, sinks], -1)
        # A token that no branch covers has no key: its output is 0.
        weights = scores.softmax(-1).nan_to_num(nan=0.0)[..., : self.keys.shape[2]]
        return torch.einsum("bhgr,bhrd->bhgd", weights, self.values.to(wide)).flatten(1, 2).to(q.dtype)

    def _parts(self) -> list[slice]:
        """Return the rows of each branch."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def _rate(self, number: int) -> int:
        return self.pattern.branches[number].dilation_rate

    def _offsets(self, number: int, k: Tensor) -> Tensor:
        return torch.tensor(self.pattern.offsets(self.pattern.branches[number], k.shape[1]), device=k.device)

    def _segment_start(self, number: int, row: Tensor) -> Tensor:
        """Return the first row of the segment that holds each row; the first segment ends at the shift."""
        length, shift = self.pattern.branches[number].segment_length, (self.pattern.shift or {number: 0})[number]
        return torch.where(row < shift, 0, (row - shift) // length * length + shift)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the tokens so far with those that come, and 0: masks count all tokens."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens so far."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: there is no longest text."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = self.valid = None
        self.is_initialized, self.seen = False, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each beam go on from another."""
        if self.is_initialized:
            assert self.valid is not None
            super().reorder_cache(beam_idx)
            self.valid = self.valid.index_select(0, beam_idx.to(self.valid.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every item."""
        if self.is_initialized:
            assert self.keys is not None
            self.reorder_cache(torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some items."""
        self.reorder_cache(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ConfigError: what a segment has dropped does not come back."""
        raise ConfigError("a compact cache keeps open segments alone and cannot take tokens back; use a DynamicCache")


def layer_of(key: Tensor) -> CompactLayer | None:
    """Return the layer of the compact cache that returned these keys; None for keys of another cache."""
    layer: CompactLayer | None = getattr(key, _LAYER, None)
    return layer
