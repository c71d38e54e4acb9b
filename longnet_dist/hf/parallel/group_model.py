"""A Hugging Face model whose ranks each compute a slice of every sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function
from transformers import PreTrainedModel

from longnet_dist.comm.reductions import sum_over_ranks
from longnet_dist.errors import ConfigError
from longnet_dist.hf.parallel.dealing import deal_whole_batches
from longnet_dist.hf.parallel.head_loss import CHUNK, cross_entropy_sum, head_loss, replaced_forward
from longnet_dist.hf.parallel.mlp_tiles import tile_mlps
from longnet_dist.hf.parallel.whole_batch import WholeBatch
from longnet_dist.hf.pattern_field import NAME, pattern_of
from longnet_dist.numerics import differentiable_once
from longnet_dist.private_interfaces import attention_of

Model = TypeVar("Model")
_SETTINGS = "_longnet_dist_parallel"
_HOOKED = "_longnet_dist_averaged"
_KINDS = {"ForCausalLM": True, "ForMaskedLM": False, "ForTokenClassification": False, None: False}
"""Models whose outputs belong to single tokens, and whether a token's label is the next token."""


def sequence_parallel(
    model: Model,
    group: dist.ProcessGroup | None,
    *,
    loss_chunk: int = CHUNK,
    mlp_tile: int | None = None,
    average_gradients: bool = True,
) -> Model:
    """Let each rank of a group compute a contiguous slice of every sequence; return the model.

    ::

        model = hf.sequence_parallel(hf.dilate(model, pattern), dist.group.WORLD)
        model(input_ids=tokens, labels=tokens).loss.backward()

    Every rank calls the model with the same whole batch, as on one process: ids, labels, mask, positions. The model
    cuts out the rank's slice, with global positions; labels are shifted before. The loss is that of one process, equal
    on all ranks: the mean over all labels of the batch. After ``backward`` every rank has the gradients of one process.

    With labels the output has no logits. Without, logits and hidden states ``(B, n, …)`` are the rank's slice,
    ``n = ⌈N / P⌉``; where ``P`` does not divide ``N``, the last ones are padding. ``generate`` computes whole sequences
    on each rank. In place of ``group``, None makes a model of one process with the same loss and tiles.

    Args:
        model: a decoder or an encoder that :func:`~longnet_dist.hf.dilate` took, also inside peft's: with a head for
            the next token, for masked tokens or for classes of tokens, or without a head.
        group: its rank order is the order of the slices; all its ranks must call.
        loss_chunk: tokens whose logits exist at once.
        mlp_tile: tokens for which a feed-forward network computes at once; None for all.
        average_gradients: whether ``backward`` averages gradients over the group. A loss of your own on slices counts
            with its mean over the ranks. Set it to False only where something else averages over all ranks, such as DDP
            or ZeRO, to save that communication.

    Raises:
        ConfigError: a model, group or number that cannot work.
    """
    inner = base_model_of(model)
    _check(inner, group, loss_chunk, mlp_tile)
    if mlp_tile is not None:
        tile_mlps(inner, mlp_tile)
    if not hasattr(inner, _SETTINGS):
        inner.__class__ = _subclass(type(inner))
        setattr(inner, _SETTINGS, _Settings(group, loss_chunk, average_gradients))
    settings = getattr(inner, _SETTINGS)
    settings.group, settings.loss_chunk, settings.average_gradients = group, loss_chunk, average_gradients
    deal_whole_batches(group_of)
    return model


def base_model_of(model: Any) -> Any:
    """Return the model of transformers inside peft's or another; a model of transformers itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def group_of(model: Any) -> dist.ProcessGroup | None:
    """Return the group of a sequence-parallel model; None for any other model and for one process."""
    settings = getattr(base_model_of(model), _SETTINGS, None)
    return None if settings is None else settings.group


@dataclass(eq=False)
class _Settings:
    group: dist.ProcessGroup | None
    loss_chunk: int
    average_gradients: bool
    whole: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Settings:
        return _Settings(self.group, self.loss_chunk, self.average_gradients)  # a process group has no copy

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Compute whole sequences on this rank."""
        before, self.whole = self.whole, True
        try:
            yield
        finally:
            self.whole = before


def _check(model: Any, group: Any, loss_chunk: Any, mlp_tile: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"sequence_parallel takes a model of transformers, not {type(model).__name__}")
    config = model.config.get_text_config()
    if attention_of(config) != NAME:
        raise ConfigError(
            f"sequence_parallel needs dilated attention, but the model has {attention_of(config)}; call "
            f"longnet_dist.hf.dilate(model, pattern) first"
        )
    pattern_of(config)
    kind = getattr(model, "loss_type", None)
    if kind not in _KINDS or (kind is None and "For" in type(model).__name__):
        raise ConfigError(
            f"a sequence-parallel model gives something for each token, but {type(model).__name__} reads some of them; "
            f"use a model for language modelling or classes of tokens, or one without a head"
        )
    if getattr(config, "final_logit_softcapping", None) is not None:
        raise ConfigError("the loss in chunks has no soft cap, but final_logit_softcapping is set; set it to None")
    for name, number in (("loss_chunk", loss_chunk), ("mlp_tile", mlp_tile)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ConfigError(f"{name} must be a whole number of tokens, at least 1, but {name}={number!r}; use 1024")
    if group is not None and (not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0):
        raise ConfigError(
            f"group must be a torch.distributed process group that has this rank, or None, but is {group!r}"
        )


def _subclass(original: type[Any]) -> type[Any]:
    """Return a class of the same name, since config.json and Trainer read it; copies of a model keep it."""

    @wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, _SETTINGS).whole:
            return original.forward(self, *args, **kwargs)
        return _forward(self, original.forward, args, kwargs)

    members = {"forward": forward, "__module__": original.__module__}
    if hasattr(original, "generate"):

        @wraps(original.generate)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            with getattr(self, _SETTINGS).alone():
                return original.generate(self, *args, **kwargs)

        members["generate"] = generate
    return type(original.__name__, (original,), members)


def _forward(model: Any, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    settings = getattr(model, _SETTINGS)
    group = settings.group
    over_ranks = group is not None and dist.get_world_size(group) > 1
    batch = WholeBatch(original, args, kwargs, group)
    labels = batch.labels(_KINDS[getattr(model, "loss_type", None)])
    inner = batch.cut()
    if over_ranks and settings.average_gradients:
        _average_gradients(model, settings)
        if isinstance(whole := batch.given.get("inputs_embeds"), Tensor):
            inner["inputs_embeds"] = batch.slice.cut(_AverageInBackward.apply(whole, group))  # type: ignore[no-untyped-call]
    head = model.get_output_embeddings() if labels is not None else None
    if head is None:
        out = original(model, **inner)
    else:
        with replaced_forward(head, _same):  # the head's inputs come out as logits
            out = original(model, **inner)
    _check_layers(model, batch.slice.calls)
    if labels is not None:
        mine, count = labels
        total = (
            cross_entropy_sum(out.logits, mine)
            if head is None
            else head_loss(head, out.logits, mine, settings.loss_chunk)
        )
        if over_ranks:
            total = sum_over_ranks(total, group)
        out = replace(out, loss=total / count, logits=None)
    if "pooler_output" in {field.name for field in fields(out)}:
        out = replace(out, pooler_output=None)  # of a sequence's first token, which one rank has
    as_dict = kwargs.get("return_dict", model.config.return_dict)
    return out.to_tuple() if as_dict is False else out


def _same(states: Tensor) -> Tensor:
    return states


def _check_layers(model: Any, calls: int) -> None:
    layers = model.config.get_text_config().num_hidden_layers
    if calls < layers:
        raise ConfigError(
            f"{type(model).__name__} hands its arguments to the attention of {calls} layers of {layers}, so slices "
            f"would attend to themselves alone; it cannot be sequence-parallel"
        )


def _average_gradients(model: Any, settings: _Settings) -> None:
    """Give each trained parameter, those of new adapters too, a hook that averages what a backward pass adds."""
    for parameter in model.parameters():
        if parameter.requires_grad and getattr(parameter, _HOOKED, None) is not settings:
            parameter.register_hook(lambda gradient: _average(gradient, settings))
            setattr(parameter, _HOOKED, settings)


def _average(gradient: Tensor, settings: _Settings) -> Tensor:
    group = settings.group
    if group is None or not settings.average_gradients or dist.get_world_size(group) == 1:
        return gradient
    return _mean(gradient, group)


def _mean(gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the mean of the ranks' gradients."""
    total = gradient.detach().contiguous().clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


class _AverageInBackward(Function):
    """Pass on what all ranks have; backward averages its gradient over the ranks."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _mean(gradient, ctx.group), None
