"""LongNetEncoder: features or tokens in; rows, hidden states of all layers, and a summary of each sequence out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from longnet_dist.attention.phantoms import PhantomKeys
from longnet_dist.comm.reductions import sum_over_ranks
from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.errors import ShapeError
from longnet_dist.geometry.documents import Documents
from longnet_dist.model.batch_layout import BatchLayout
from longnet_dist.model.block import Block
from longnet_dist.model.head import LanguageModelHead
from longnet_dist.model.longnet import ModelExecution, positions_of_layers, run_blocks
from longnet_dist.model.loss import IGNORE_INDEX
from longnet_dist.model.position_embedding import (
    LearnedPositions,
    row_places,
    sincos,
    tile_places,
    warn_of_coincidences,
)


class EncoderOutput(NamedTuple):
    """Hold what :class:`LongNetEncoder` returns for this rank's rows.

    With a cls row, ``n`` counts it: it is row 0 (of the group's first rank).

    Attributes:
        last_hidden_state: ``(B, n, E)``, behind the last norm if there is one; 0 in padding.
        hidden_states: the embedded rows and every block's output, ``(B, n, E)`` each, without the last norm; None
            unless asked for.
        pooled: ``(B, E)``, or ``(B·documents, E)`` with packed documents; the same on all ranks. None without a pool.
        pooled_states: the pool of each of ``hidden_states``; None unless they are asked for.
        logits: ``(B, n, V)``; None without a head, or with labels.
        loss: mean cross-entropy of the labelled rows, nats; None without labels.
        loss_sum: sum of the cross-entropies, float32 (float64 for float64 models); None without labels.
        num_labels: number of labelled rows, int64 scalar; None without labels.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    pooled: Tensor | None = None
    pooled_states: tuple[Tensor, ...] | None = None
    logits: Tensor | None = None
    loss: Tensor | None = None
    loss_sum: Tensor | None = None
    num_labels: Tensor | None = None


class LongNetEncoder(nn.Module):
    """Encode sequences of features or tokens: embedding, positions, blocks, norm; then a pool, or a head.

    A rank of a group passes its slice. With a cls row, the slice of the group's first rank begins with it, so that rank
    passes one row fewer than the others.

    Args:
        config: sizes and mathematics.
        group: the sequence-parallel group, its rank order the order of the slices; None for one device.
        overlap, backend, deterministic: of the attention; see :func:`~longnet_dist.dilated_attention`.
        execution: what an engine saves, recomputes, compiles and offloads; it changes no result. The engine runs blocks
            of LongNet's own style. Blocks of another style run as plain modules; checkpointing works for them too.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        group: dist.ProcessGroup | None = None,
        overlap: bool = True,
        backend: str = "auto",
        deterministic: bool = False,
        execution: ModelExecution | None = None,
    ) -> None:
        super().__init__()
        self.config, self.group = config, group
        self.execution: ModelExecution | None = None
        positions = positions_of_layers(config)
        self.positions = positions[0]
        self.phantom_keys = PhantomKeys(config.heads, config.kv_heads or config.heads) if config.phantom_keys else None
        self._build_embedding(config)
        self.blocks = nn.ModuleList(
            Block(
                config,
                positions[layer],
                group,
                overlap,
                backend,
                deterministic,
                config.style(layer),
                self.phantom_keys,
                layer,
            )
            for layer in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps) if config.final_norm else nn.Identity()
        eps = config.pool_norm_eps
        self.pool_norm = nn.Identity() if eps is None else nn.LayerNorm(config.dim, eps=eps)
        self.head: LanguageModelHead | None = None
        if config.outputs is not None:
            self.head = LanguageModelHead(config.dim, config.outputs, config.logits_rows)
            if config.tie_embeddings:
                assert self.embedding is not None
                self.head.weight = self.embedding.weight
        if execution is not None:
            execution.attach(self)

    def _build_embedding(self, config: EncoderConfig) -> None:
        dim = config.dim
        self.embedding: nn.Embedding | None = None
        if config.vocab_size is not None:
            self.embedding = nn.Embedding(config.vocab_size, dim)
            nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.projection: nn.Linear | None = None
        if config.feature_dim is not None:
            self.projection = nn.Linear(config.feature_dim, dim)
            nn.init.xavier_normal_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
        self.learned_positions: LearnedPositions | None = None
        if config.max_positions is not None:
            self.learned_positions = LearnedPositions(config.max_positions, dim, config.position_offset)
        self.embedding_norm = nn.LayerNorm(dim, eps=config.norm_eps) if config.embedding_norm else nn.Identity()
        if config.cls_token:
            self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)

    def forward(
        self,
        tokens: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        features: Tensor | None = None,
        coords: Tensor | None = None,
        lengths: Any = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Any = None,
        total_rows: int | None = None,
        packed: Documents | Sequence[int] | None = None,
        hidden_states: bool = False,
    ) -> EncoderOutput:
        """Encode a batch; with a group, all its ranks must call.

        Args:
            tokens: ``(B, n)`` int64; or give features.
            labels: ``(B, n)`` int64, the id that the head has to predict for each row, or -100 for none.
            features: ``(B, n, F)``, or ``(B, n, E)`` without ``config.feature_dim``.
            coords: ``(B, n, C)``, the place of each row, for ``position_embedding="sincos"``. With one coordinate they
                may be left out: rows are counted then.
            lengths: ``(B,)`` integers, rows of each item before its padding. Padding takes no part and is not
                computed.
            padding_mask: ``(B, n)`` bool, true in padding, as torchscale has it: these rows are cleared once, and the
                others attend to them. For models with ``phantom_keys``; others take ``lengths``.
            cu_seqlens: edges of packed documents, as in :func:`~longnet_dist.dilated_attention`.
            total_rows: ``N`` of the whole sequence, cls row included; if not given, ranks find it out.
            packed: rows of each of the sequences that lie one behind the other in one item, over all ranks together. A
                cls row comes before each. Ranks hold even slices of all rows, cls rows counted, and a rank passes those
                of its slice that are no cls rows. :class:`~longnet_dist.geometry.documents.Documents` count cls rows.
            hidden_states: also return the hidden states of all layers.

        Raises:
            ShapeError: shapes, rows or edges that do not fit, or arguments that this encoder does not take.
            ConfigError: positions that cannot span the pattern.
        """
        inputs = self._checked(tokens, labels, features, coords, padding_mask)
        batch, rows = inputs.shape[:2]
        layout = self._layout(batch, rows, lengths, cu_seqlens, packed)
        start, total = self._place(layout, total_rows, inputs.device)
        ranks = self.group is not None
        states: list[Tensor] | None = [] if hidden_states else None
        x = run_blocks(
            self.blocks,
            self._rows(inputs, coords, padding_mask, layout, start, total),
            start if ranks else None,
            total if ranks else None,
            None,
            layout.documents,
            states,
        )
        return self._output(x, states, labels, layout, start, total)

    def _layout(
        self, batch: int, rows: int, lengths: Any, cu_seqlens: Any, packed: Documents | Sequence[int] | None
    ) -> BatchLayout:
        cls_token = self.config.cls_token
        if packed is None:
            return BatchLayout.of(batch, rows, lengths, cu_seqlens, cls_token, self.group)
        if lengths is not None or cu_seqlens is not None:
            raise ShapeError("packed gives the lengths of all sequences; leave lengths and cu_seqlens out")
        return BatchLayout.packed(packed, batch, rows, cls_token, self.group)

    def _rows(
        self,
        inputs: Tensor,
        coords: Tensor | None,
        padding_mask: Tensor | None,
        layout: BatchLayout,
        start: int,
        total: int,
    ) -> Tensor:
        """Return the embedded rows ``(B', S, E)`` that enter the first block."""
        x = self._placed(self._embedded(layout.enter(inputs)), coords, layout, start, total)
        x = self._cleared(self.embedding_norm(x), padding_mask, layout)
        return F.dropout(x, self.config.dropout, self.training)

    def _output(
        self, x: Tensor, states: list[Tensor] | None, labels: Tensor | None, layout: BatchLayout, start: int, total: int
    ) -> EncoderOutput:
        x = self.norm(x)
        pool = self.config.pool != "none"
        output = EncoderOutput(
            layout.leave(x),
            None if states is None else tuple(map(layout.leave, states)),
            self._pooled(x, layout, start, total) if pool else None,
            tuple(self._pooled(h, layout, start, total) for h in states) if states is not None and pool else None,
        )
        if self.head is None:
            return output
        if labels is None:
            return output._replace(logits=layout.leave(self.head(x)))
        compile = self.execution is not None and self.execution.compiles(self.training, False)
        none = labels.new_full((1, 1), IGNORE_INDEX)
        wanted = layout.add_cls(layout.enter(labels), none)
        loss_sum, num_labels = self.head(x, wanted, compile), (wanted != IGNORE_INDEX).sum()
        return output._replace(loss=loss_sum / num_labels.clamp(min=1), loss_sum=loss_sum, num_labels=num_labels)

    def _checked(
        self,
        tokens: Tensor | None,
        labels: Tensor | None,
        features: Tensor | None,
        coords: Tensor | None,
        padding_mask: Tensor | None,
    ) -> Tensor:
        """Return the tokens or features, after all shapes were checked."""
        if (tokens is None) == (features is None):
            raise ShapeError("an encoder takes tokens or features; give one of them")
        inputs = cast(Tensor, features if tokens is None else tokens)
        if tokens is not None and self.embedding is None:
            raise ShapeError("the encoder has no embedding for tokens; give features, or set vocab_size")
        if tokens is not None and tokens.dim() != 2:
            raise ShapeError(f"tokens must be (batch, rows), but are {tuple(tokens.shape)}")
        width = self.config.feature_dim or self.config.dim
        if features is not None and (features.dim() != 3 or features.shape[2] != width):
            raise ShapeError(f"features must be (batch, rows, {width}), but are {tuple(features.shape)}")
        self._check_dtypes(tokens, labels, features)
        if labels is not None and self.head is None:
            raise ShapeError("the encoder has no head for labels; set outputs")
        if labels is not None and labels.shape != inputs.shape[:2]:
            raise ShapeError(f"labels must be {tuple(inputs.shape[:2])}, but are {tuple(labels.shape)}")
        self._check_coordinates(coords, inputs)
        self._check_padding_mask(padding_mask, inputs)
        return inputs

    def _check_dtypes(self, tokens: Tensor | None, labels: Tensor | None, features: Tensor | None) -> None:
        for name, ids in (("tokens", tokens), ("labels", labels)):
            if ids is not None and ids.dtype not in (torch.int32, torch.int64):
                raise ShapeError(f"{name} must be int64, but are {_shown(ids.dtype)}; convert them with {name}.long()")
        if features is None:
            return
        if not features.is_floating_point():
            raise ShapeError(f"features must be floating-point, but are {_shown(features.dtype)}; use features.float()")
        # A projection that somebody has wrapped or quantized converts by itself, as autocast does.
        plain = self.projection if type(self.projection) is nn.Linear else None
        if plain is None or torch.is_autocast_enabled(features.device.type):
            return
        if features.dtype != (needed := plain.weight.dtype):
            raise ShapeError(
                f"features are {_shown(features.dtype)}, but the encoder is {_shown(needed)}; use "
                f"features.to({needed}), or encoder.to({features.dtype})"
            )

    def _check_coordinates(self, coords: Tensor | None, inputs: Tensor) -> None:
        if self.config.position_embedding != "sincos":
            if coords is not None:
                raise ShapeError("coordinates belong to position_embedding=sincos; leave them out")
            return
        shape = (*inputs.shape[:2], number := self.config.coordinates)
        if (coords is None and number > 1) or (coords is not None and coords.shape != shape):
            given = "none" if coords is None else tuple(coords.shape)
            axes = ", ".join("xyz"[:number])
            raise ShapeError(
                f"coordinates must be (batch, rows, {number}), here {shape}, but are {given}; give coords= with {axes} "
                f"of every row"
            )

    def _check_padding_mask(self, padding_mask: Tensor | None, inputs: Tensor) -> None:
        if padding_mask is None:
            return
        if self.phantom_keys is None:
            raise ShapeError(
                "padding_mask clears rows that others attend to, as torchscale's bidirectional models do; this model "
                "leaves padding out: give lengths"
            )
        if padding_mask.dtype != torch.bool or padding_mask.shape != inputs.shape[:2]:
            raise ShapeError(
                f"padding_mask must be bool {tuple(inputs.shape[:2])}, but is {padding_mask.dtype} "
                f"{tuple(padding_mask.shape)}"
            )

    def _embedded(self, inputs: Tensor) -> Tensor:
        x = inputs if self.projection is None else self.projection(inputs)
        if not inputs.is_floating_point():
            assert self.embedding is not None
            x = self.embedding(inputs)
        return x * math.sqrt(self.config.dim) if self.config.scale_embedding else x

    def _place(self, layout: BatchLayout, total_rows: int | None, device: torch.device) -> tuple[int, int]:
        """Return the first global row of this rank, and the rows of all ranks."""
        rows = layout.computed_rows
        if layout.window is not None and layout.documents is not None:
            return layout.window[0], layout.documents.stops[-1]
        if self.group is None or (ranks := dist.get_world_size(self.group)) == 1:
            return 0, rows
        rank = dist.get_rank(self.group)
        if total_rows is None:
            mine = torch.tensor([rows], device=device)
            all_rows = [torch.empty_like(mine) for _ in range(ranks)]
            dist.all_gather(all_rows, mine, group=self.group)
            total_rows = int(torch.cat(all_rows).sum())
        # All ranks hold the same number of rows, the last may hold fewer: so it begins where the whole is complete.
        return (rank * rows if rank < ranks - 1 else total_rows - rows), total_rows

    def _placed(self, x: Tensor, coords: Tensor | None, layout: BatchLayout, start: int, total: int) -> Tensor:
        """Add the positions, and put the cls rows before the sequences; a cls row has no coordinates."""
        config = self.config
        if coords is not None:
            x = x + sincos(self._coordinates(coords, layout), config.dim, x.dtype)
        if config.cls_token:
            x = layout.add_cls(x, self.cls_token.to(x.dtype))
        if coords is None and config.position_embedding == "sincos":
            numbers = row_places(start, x.shape[1], layout.documents, x.device) - int(layout.has_cls)
            vectors = sincos(numbers.unsqueeze(-1), config.dim, x.dtype)
            x = x + vectors * (numbers >= 0).unsqueeze(-1)
        if self.learned_positions is not None:
            x = x + self.learned_positions(self.learned_positions.places(start, x.shape[1], total, layout.documents))
        return x

    def _coordinates(self, coords: Tensor, layout: BatchLayout) -> Tensor:
        """Return the coordinates ``(B', S, C)`` of the computed rows."""
        coords, size = layout.enter(coords), self.config.tile_size
        if size is None:
            return coords
        places = tile_places(coords, size)
        for sequence in torch.split(places[0], list(layout.parts)) if layout.parts else places:
            warn_of_coincidences(sequence, size)
        return places

    def _cleared(self, x: Tensor, padding_mask: Tensor | None, layout: BatchLayout) -> Tensor:
        if padding_mask is None:
            return x
        kept = layout.add_cls(layout.enter(padding_mask), padding_mask.new_zeros(1, 1)).logical_not()
        return x * kept.unsqueeze(-1)

    def _pooled(self, x: Tensor, layout: BatchLayout, start: int, total: int) -> Tensor:
        """Return the normed pool ``(B'·sequences, E)`` of computed rows ``(B', S, E)``."""
        parts = []
        for first, stop in layout.sequences(total):
            first, stop = (first, first + 1) if self.config.pool == "cls" else (first + layout.has_cls, stop)
            here, there = (min(max(row - start, 0), x.shape[1]) for row in (first, stop))
            part = x[:, here:there]
            parts.append(part.mean(1) * ((there - here) / (stop - first)) if here < there else part.sum(1))
        pooled: Tensor = torch.stack(parts, 1).flatten(0, 1)
        if self.group is not None:
            pooled = sum_over_ranks(pooled, self.group)
        normed: Tensor = self.pool_norm(pooled)
        return normed


def _shown(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
