"""A decoder of transformers that trains, evaluates and writes as a LongNet does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from longnet_dist.attention.decoding import Decoding
from longnet_dist.attention.stream import Stream
from longnet_dist.config.hf_model import HuggingFaceConfig
from longnet_dist.engine.execution import Execution
from longnet_dist.errors import ShapeError
from longnet_dist.hf.decoder.stream_attention import STREAMED, StreamAttention
from longnet_dist.hf.parallel.head_loss import head_loss
from longnet_dist.hf.parallel.mlp_tiles import tile_mlps
from longnet_dist.model.longnet import LongNetOutput, decoding_of, stream_of
from longnet_dist.model.loss import IGNORE_INDEX
from longnet_dist.private_interfaces import set_attention


class StreamedDecoder(nn.Module):
    """Compute a decoder of transformers with dilated attention, in chunks and over ranks.

    It is called as :class:`~longnet_dist.LongNet` is. Its parameters have the names that they have in transformers. The
    weights depend on the seed of torch's default generator alone.

    Args:
        config: the model and its pattern.
        group: the sequence-parallel group, its rank order the order of the slices; None for one device.
        overlap, backend, deterministic: of the attention; see :func:`~longnet_dist.dilated_attention`.
        execution: of its settings, ``checkpointing`` (``none`` or ``full``) and ``tile`` are followed.
    """

    def __init__(
        self,
        config: HuggingFaceConfig,
        *,
        group: dist.ProcessGroup | None = None,
        overlap: bool = True,
        backend: str = "auto",
        deterministic: bool = False,
        execution: Execution | None = None,
    ) -> None:
        super().__init__()
        self.config, self.group, self.execution = config, group, execution
        self._options = overlap, backend, deterministic
        fields = config.fresh_transformers()
        set_attention(fields, STREAMED)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(fields, dtype=torch.float32)
        self._whole = (model,)  # in a tuple, since its parts are this module's own
        for name, part in model.named_children():
            self.add_module(name, part)
        if execution is not None and execution.checkpointing == "full":
            # Reentrant: the first forward then saves nothing, also of the attention's own tensors.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": True})
        if execution is not None and execution.tile is not None:
            tile_mlps(model, execution.tile)
        self.train()

    @property
    def transformers_model(self) -> PreTrainedModel:
        """Return the model of transformers with these parameters."""
        return self._whole[0]

    @property
    def attentions(self) -> list[nn.Module]:
        """Return the attention of each layer."""
        return [cast(nn.Module, layer.self_attn) for layer in self._layers]

    @property
    def block_types(self) -> list[type[nn.Module]]:
        """Return the classes of the blocks."""
        return [type(self._layers[0])]

    @property
    def output_layer(self) -> nn.Module:
        """Return the layer that maps states to logits."""
        return cast(nn.Module, self.transformers_model.get_output_embeddings())

    @property
    def _layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.transformers_model.base_model.layers)

    def stream(self, total_rows: int, cu_seqlens: Any = None) -> Stream:
        """Return a stream in which a sequence of ``total_rows`` rows passes through this model in chunks."""
        return stream_of(self.config, self.group, total_rows, cu_seqlens)

    def decoding(self, texts: int, max_rows: int) -> Decoding:
        """Return the cache with which ``texts`` texts of at most ``max_rows`` rows are continued, each from its row."""
        return decoding_of(self.config, texts, max_rows, next(self.parameters()))

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        total_rows: int | None = None,
        stream: Stream | Decoding | None = None,
        cu_seqlens: Any = None,
    ) -> LongNetOutput:
        """Return the loss if labels are given, else the logits; with a group, all its ranks must call.

        Args:
            tokens: ``(B, n)`` int64, this rank's rows.
            labels: ``(B, n)`` int64, the id that each row has to predict (shifted by the caller), or -100 for none.
            total_rows: rows ``N`` of the whole sequence, over all ranks of the group; needed with a group unless there
                is a stream.
            stream: the stream whose present chunk the tokens are, or the texts of which ``tokens (B, 1)`` are the next
                rows.
            cu_seqlens: edges of packed documents, without a stream.

        Raises:
            ShapeError: shapes or rows that do not fit.
        """
        if tokens.dim() != 2 or (labels is not None and labels.shape != tokens.shape):
            given = "none" if labels is None else tuple(labels.shape)
            raise ShapeError(f"tokens and labels must both be (batch, rows), but are {tuple(tokens.shape)} and {given}")
        if stream is None:
            stream = self._whole_sequence(tokens.shape[1], total_rows, cu_seqlens)
        head = self.output_layer
        states: Tensor = self.transformers_model.base_model(
            input_ids=tokens,
            position_ids=_positions(stream, tokens),
            use_cache=False,
            stream_attention=StreamAttention(stream, self.group, *self._options),
        ).last_hidden_state
        if stream.recording:
            return LongNetOutput(None, None, None, None)
        if labels is None:
            return LongNetOutput(None, head(states), None, None, states)
        loss_sum, num_labels = head_loss(head, states, labels, self.config.logits_rows), (labels != IGNORE_INDEX).sum()
        return LongNetOutput(loss_sum / num_labels.clamp(min=1), None, loss_sum, num_labels)

    def _whole_sequence(self, rows: int, total_rows: int | None, cu_seqlens: Any) -> Stream:
        """Return a stream of one chunk."""
        if self.group is not None and total_rows is None:
            raise ShapeError("over ranks the rows of the whole sequence must be known; pass total_rows or a stream")
        stream = self.stream(total_rows or rows, cu_seqlens)
        stream.enter(stream.chunks(stream.total_rows)[0])
        return stream

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StreamedDecoder:
        """Apply ``fn`` to all tensors; buffers keep their dtype, since bfloat16 has no room for angles of rotations."""
        kept = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            owner, _, last = name.rpartition(".")
            module = self.get_submodule(owner)
            setattr(module, last, buffer.to(getattr(module, last).device))
        return self


def _positions(stream: Stream | Decoding, tokens: Tensor) -> Tensor:
    """Return the positions ``(1, n)``, or ``(B, 1)``, of the tokens in their documents."""
    if isinstance(stream, Decoding):
        return stream.rows[:, None]
    assert stream.shards is not None
    first, stop = stream.shards.window(stream.rank)
    rows = torch.arange(first, stop, device=tokens.device)
    if stream.documents is not None:
        starts = torch.from_numpy(stream.documents.array_starts).to(tokens.device)
        rows = rows - starts[(torch.searchsorted(starts, rows, right=True) - 1).clamp(min=0)]
    return rows[None]
