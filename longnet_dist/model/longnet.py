"""LongNet: a causal language model, or a bidirectional encoder, of blocks with dilated attention."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from longnet_dist.attention.decoding import Decoding
from longnet_dist.attention.packing import documents_of_model
from longnet_dist.attention.positions import Positions
from longnet_dist.attention.stream import Stream
from longnet_dist.config.model import LongNetConfig
from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.geometry.documents import Documents
from longnet_dist.geometry.position_encodings import POSITION_ENCODINGS
from longnet_dist.model.block import Block
from longnet_dist.model.head import LanguageModelHead
from longnet_dist.model.loss import IGNORE_INDEX


class LongNetOutput(NamedTuple):
    """Hold what :class:`LongNet` returns for this rank's rows.

    Attributes:
        loss: mean cross-entropy of the labelled rows, nats; None without labels.
        logits: ``(B, n, V)``; None with labels, because they are never held whole, and without the head.
        loss_sum: sum of the cross-entropies, float32 (float64 for float64 models); None without labels.
        num_labels: number of labelled rows, int64 scalar; None without labels.
        last_hidden_state: ``(B, n, E)``, behind the last norm; with labels, only if the hidden states are asked for.
        hidden_states: the embedded rows and every block's output, ``(B, n, E)`` each, without the last norm; None
            unless asked for.
    """

    loss: Tensor | None
    logits: Tensor | None
    loss_sum: Tensor | None
    num_labels: Tensor | None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class BlockModel(Protocol):
    """A model of blocks: :class:`LongNet` or :class:`~longnet_dist.LongNetEncoder`."""

    execution: ModelExecution | None
    blocks: nn.ModuleList


AnyModel = TypeVar("AnyModel", bound=BlockModel)


class ModelExecution(Protocol):
    """Say how a model is computed: :class:`longnet_dist.engine.execution.Execution`."""

    def attach(self, model: AnyModel) -> AnyModel:
        """Let an engine run the blocks of ``model``."""

    def compiles(self, training: bool, streamed: bool) -> bool:
        """Return whether a pass is compiled."""


class ScaledEmbedding(nn.Embedding):
    """Look up rows of the weight and multiply them by the root of the model dim."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(…, E)`` for ids ``(…)``; it multiplies the rows taken, or the weight where that is smaller."""
        scale = math.sqrt(self.embedding_dim)
        if input.numel() < self.num_embeddings:
            return F.embedding(input, self.weight) * scale
        return F.embedding(input, self.weight * scale)


class LongNet(nn.Module):
    """Compute the language model or encoder: embedding, blocks, LayerNorm, output projection (LongNet, section 4.1).

    The weights depend on the seed of torch's default generator alone, not on the group.

    Args:
        config: sizes and mathematics.
        group: the sequence-parallel group, its rank order the order of the slices; None for one device.
        overlap, backend, deterministic: of the attention; see :func:`~longnet_dist.dilated_attention`.
        execution: what an engine saves, recomputes, compiles and offloads; it changes no result. None: the blocks run
            as plain modules.
    """

    def __init__(
        self,
        config: LongNetConfig,
        *,
        group: dist.ProcessGroup | None = None,
        overlap: bool = True,
        backend: str = "auto",
        deterministic: bool = False,
        execution: ModelExecution | None = None,
    ) -> None:
        super().__init__()
        if isinstance(config, str):
            raise ConfigError(f"a model is made from a LongNetConfig; use LongNet(named_model({config!r}))")
        self.config, self.group = config, group
        self.execution: ModelExecution | None = None
        positions = positions_of_layers(config)
        self.positions = positions[0]
        self.embedding = ScaledEmbedding(config.vocab_size + (config.mask_id is not None), config.dim)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        self.blocks = nn.ModuleList(
            Block(config, positions[layer], group, overlap, backend, deterministic, layer=layer)
            for layer in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.head = LanguageModelHead(config.dim, config.vocab_size, config.logits_rows)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        if execution is not None:
            execution.attach(self)

    @property
    def attentions(self) -> list[nn.Module]:
        """Return the attention of each layer."""
        return [cast(Block, block).self_attn for block in self.blocks]

    @property
    def block_types(self) -> list[type[nn.Module]]:
        """Return the classes of the blocks."""
        return [Block]

    def stream(self, total_rows: int, cu_seqlens: Any = None) -> Stream:
        """Return a stream in which a sequence of ``total_rows`` rows passes through this model in chunks."""
        return stream_of(self.config, self.group, total_rows, cu_seqlens)

    def decoding(self, texts: int, max_rows: int) -> Decoding:
        """Return the cache with which ``texts`` texts of at most ``max_rows`` rows are continued, each from its row.

        Raises:
            ConfigError: a bidirectional model, one that needs whole sequences, or xPos cannot span the pattern.
        """
        return decoding_of(self.config, texts, max_rows, self.embedding.weight, self.positions)

    def forward(
        self,
        tokens: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        start: int | None = None,
        total_rows: int | None = None,
        stream: Stream | Decoding | None = None,
        cu_seqlens: Any = None,
        inputs_embeds: Tensor | None = None,
        hidden_states: bool = False,
        head: bool = True,
    ) -> LongNetOutput:
        """Return the loss if labels are given, else the logits; with a group, all its ranks must call.

        Args:
            tokens: ``(B, n)`` int64, this rank's rows; ``config.mask_id`` is an id too.
            labels: ``(B, n)`` int64, the id that each row has to predict (shifted by the caller), or -100 for none.
            start: global row of the first one, if the caller wants it checked (on this rank alone): it follows from
                the group.
            total_rows: rows ``N`` of the whole sequence, those of all ranks of the group together; the same on every
                rank. It decides where segments end and which keys are exchanged. If not given, every layer sums the
                rows of all ranks by a small collective. With a stream, ``N`` is the stream's.
            stream: the stream whose present chunk the tokens are; its chunks must come in order. While it only records,
                nothing is returned. Or the texts of which ``tokens (B, 1)`` are the next rows.
            cu_seqlens: edges of packed documents, as in :func:`~longnet_dist.dilated_attention`; a stream has its own.
                Labels of the last token of a document are the caller's: -100 where it predicts nothing.
            inputs_embeds: ``(B, n, E)`` in place of tokens, what ``embedding(tokens)`` returns.
            hidden_states: also return the hidden states of all layers.
            head: False leaves the logits out, so that ``last_hidden_state`` is what the model computes.

        Raises:
            ShapeError: shapes, rows or ``start`` that do not fit.
            ConfigError: xPos cannot span the pattern.
        """
        x = self._checked(tokens, inputs_embeds, labels)
        batch, rows = x.shape[:2]
        documents, as_one = documents_of_model(cu_seqlens, batch, rows, self.group, stream)
        if as_one:
            flat: LongNetOutput = self.forward(
                None if tokens is None else x.flatten()[None],
                None if labels is None else labels.flatten()[None],
                start=start,
                total_rows=None if total_rows is None else total_rows * batch,
                cu_seqlens=documents,
                inputs_embeds=None if inputs_embeds is None else x.flatten(0, 1)[None],
                hidden_states=hidden_states,
                head=head,
            )
            return _unflattened(flat, batch, rows)
        states: list[Tensor] | None = [] if hidden_states else None
        # The embedded rows are the argument alone, so that the first block's output takes their place in memory.
        x = run_blocks(
            self.blocks,
            self.embedding(tokens) if inputs_embeds is None else inputs_embeds,
            start,
            total_rows,
            stream,
            documents,
            states,
        )
        if stream and stream.recording:
            return LongNetOutput(None, None, None, None)
        x = self._normed(x)
        known = None if states is None else tuple(states)
        if labels is None:
            return LongNetOutput(None, self.head(x) if head else None, None, None, x, known)
        compile = self.execution is not None and self.execution.compiles(self.training, stream is not None)
        loss_sum, num_labels = self.head(x, labels, compile), (labels != IGNORE_INDEX).sum()
        last = x if hidden_states else None  # else it would live until backward
        return LongNetOutput(loss_sum / num_labels.clamp(min=1), None, loss_sum, num_labels, last, known)

    def _checked(self, tokens: Tensor | None, inputs_embeds: Tensor | None, labels: Tensor | None) -> Tensor:
        """Return the tokens or the embedded rows, after the shapes were checked."""
        if (tokens is None) == (inputs_embeds is None):
            raise ShapeError("a model takes tokens or inputs_embeds; give one of them")
        if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.config.dim):
            raise ShapeError(
                f"inputs_embeds must be (batch, rows, {self.config.dim}), but are {tuple(inputs_embeds.shape)}"
            )
        for name, ids in (("tokens", tokens), ("labels", labels)):
            if not (ids is None or (isinstance(ids, Tensor) and ids.dtype in (torch.int64, torch.int32))):
                kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
                raise ShapeError(f"{name} must be a tensor of int64, but are {kind}; use torch.as_tensor and long()")
        x = cast(Tensor, inputs_embeds if tokens is None else tokens)
        if (tokens is not None and tokens.dim() != 2) or (labels is not None and labels.shape != x.shape[:2]):
            given = "none" if labels is None else tuple(labels.shape)
            raise ShapeError(f"tokens and labels must both be (batch, rows), but are {tuple(x.shape)} and {given}")
        return x

    def _normed(self, x: Tensor) -> Tensor:
        """Apply ``norm`` to as many rows at a time as torch's kernels can count with 32 bits."""
        tiles = torch.split(x, max(1, (2**31 - 1) // (x.shape[0] * x.shape[2])), dim=1)
        return self.norm(x) if len(tiles) == 1 else torch.cat([self.norm(tile) for tile in tiles], dim=1)


def stream_of(
    config: LongNetConfig, group: dist.ProcessGroup | None, total_rows: int, cu_seqlens: Any = None
) -> Stream:
    """Return a stream in which a sequence passes through a model in chunks, over the ranks of its group.

    Args:
        config: of the model.
        group: the sequence-parallel group; None for one device.
        total_rows: rows ``N`` of the sequence.
        cu_seqlens: edges of packed documents, as in :class:`~longnet_dist.Stream`.

    Raises:
        ShapeError: edges that do not fit.
    """
    ranks, rank = (dist.get_world_size(group), dist.get_rank(group)) if group else (1, 0)
    patterns = [config.layer_pattern(layer) for layer in range(config.layers)]
    return Stream(
        patterns, total_rows, config.layers, num_ranks=ranks, rank=rank, causal=config.causal, cu_seqlens=cu_seqlens
    )


def decoding_of(
    config: LongNetConfig, texts: int, max_rows: int, weight: Tensor, positions: Positions | None = None
) -> Decoding:
    """Return the cache with which a model continues texts, each from its row.

    Args:
        config: of the model.
        texts: number of texts.
        max_rows: the most rows that a text can have.
        weight: of the model, whose dtype and device the cache gets.
        positions: of queries and keys; None if the cached keys have none, or are rotated before.

    Raises:
        ConfigError: a bidirectional model, one that needs whole sequences, or positions that cannot span ``max_rows``.
    """
    if not config.causal:
        raise ConfigError("only a causal model can continue a text, but this one has model.causal=false")
    if config.needs_whole_sequences:
        raise ConfigError(
            f"attention={config.attention} computes whole sequences, so this model cannot continue a text token by "
            "token; train one with attention=dilated or attention=full"
        )
    patterns = [config.layer_pattern(layer) for layer in range(config.layers)]
    kv_heads = config.kv_heads or config.heads
    return Decoding(patterns, texts, max_rows, kv_heads, config.head_dim, weight.dtype, weight.device, positions)


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    start: int | None,
    total_rows: int | None,
    stream: Stream | Decoding | None,
    documents: Documents | None,
    states: list[Tensor] | None,
) -> Tensor:
    """Pass ``x (B, n, E)`` through all blocks; ``states``, if given, receives it and every block's output.

    Other arguments are those of :meth:`Block.forward`; each block gets its own cache of the stream.
    """
    caches = stream.layers if stream else [None] * len(blocks)
    if states is not None:
        states.append(x)
    for block, cache in zip(blocks, caches, strict=True):
        x = block(x, start, total_rows, cache, documents)
        if states is not None:
            states.append(x)
    return x


def _unflattened(output: LongNetOutput, batch: int, rows: int) -> LongNetOutput:
    """Return the output of one sequence of ``batch · rows`` rows as that of ``batch`` items."""

    def items(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.unflatten(x[0], 0, (batch, rows))

    states = output.hidden_states
    return output._replace(
        logits=items(output.logits),
        last_hidden_state=items(output.last_hidden_state),
        hidden_states=None if states is None else tuple(torch.unflatten(x[0], 0, (batch, rows)) for x in states),
    )


def positions_of(config: LongNetConfig) -> Positions | None:
    """Return the positions of a model's queries and keys, or None."""
    if not POSITION_ENCODINGS[config.positions].rotates:
        return None
    return Positions(config.rope_theta, config.xpos_base, config.positions)


def positions_of_layers(config: LongNetConfig) -> list[Positions | None]:
    """Return the positions of each layer: one object, unless its tables would differ.

    Scales depend on the grids, and an object keeps the tables of one.
    """
    of_grid: dict[object, Positions | None] = {}
    scales, found = POSITION_ENCODINGS[config.positions].scales, []
    for layer in range(config.layers):
        pattern = config.layer_pattern(layer)
        grid = (pattern.segment_lengths, pattern.shift) if scales else None
        if grid not in of_grid:
            of_grid[grid] = positions_of(config)
        found.append(of_grid[grid])
    return found
