"""LongNet as a causal language model of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from longnet_dist.attention.decoding import Cache as LayerCache
from longnet_dist.errors import CheckpointError, ConfigError, ShapeError
from longnet_dist.geometry.documents import Documents
from longnet_dist.hf.causal_lm.generation_cache import LongNetCache
from longnet_dist.hf.causal_lm.hf_config import LongNetConfig
from longnet_dist.hf.causal_lm.padding import edges_of_batch
from longnet_dist.model.block import Block
from longnet_dist.model.longnet import LongNet
from longnet_dist.model.loss import IGNORE_INDEX
from longnet_dist.private_interfaces import checkpoint_function

# Sizes that transformers passes beside the edges of documents; the edges alone say all.
_REDUNDANT = {"cu_seq_lens_q", "max_length_q", "max_length_k", "seq_idx"}


class LongNetForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Wrap a causal :class:`longnet_dist.LongNet` as a language model of transformers.

    ::

        model = LongNetForCausalLM(LongNetConfig(name="tiny"))
        model = AutoModelForCausalLM.from_pretrained("exported")  # after import longnet_dist.hf

    Names in the state dict are those of :class:`longnet_dist.LongNet` behind ``model.``, such as
    ``model.blocks.0.self_attn.q_proj.weight``.

    Args:
        config: of the model.

    Attributes:
        model: the :class:`longnet_dist.LongNet`, which has all parameters.
    """

    config_class = LongNetConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        self.model = _checkpointable(LongNet(config.core_config()))
        self.post_init()

    @classmethod
    def of(cls, model: LongNet, **fields: Any) -> LongNetForCausalLM:
        """Wrap a model, without a copy of its weights.

        Args:
            model: causal, on one device.
            fields: of :class:`LongNetConfig` that the model's own configuration does not have.

        Raises:
            ConfigError: a bidirectional model.
        """
        config = LongNetConfig(**model.config.model_dump(), **fields)
        with torch.device("meta"):
            wrapped = cls(config)
        wrapped.model = _checkpointable(model)
        return wrapped

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Load a model; arguments of transformers.

        Raises:
            CheckpointError: the file has other tensors than the model of config.json.
        """
        with_info = options.pop("output_loading_info", False)
        resize = options.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            *arguments, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        faults = [f"missing: {name}" for name in sorted(info["missing_keys"])]
        faults += [f"unknown: {name}" for name in sorted(info["unexpected_keys"])]
        if not resize:
            faults += [f"misshapen: {fault}" for fault in sorted(map(str, info["mismatched_keys"]))]
        if faults:
            raise CheckpointError(
                "the file has other tensors than the model of config.json:\n  " + "\n  ".join(faults) + "\nuse the "
                "configuration with which the model was saved"
            )
        return (model, info) if with_info else model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LongNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits and, with labels, the loss.

        Args:
            input_ids: ``(B, n)`` int64.
            attention_mask: ``(B, n)``, true for tokens, with padding before or behind them. With a cache it also has
                the columns that came before.
            position_ids: ``(B, n)``; where they do not grow by 1, a packed document begins. Nothing else is read from
                them: positions count from the first token of a document.
            cache: of a text that is continued. With it nothing is differentiated.
            inputs_embeds: ``(B, n, E)`` in place of ids, what ``get_input_embeddings()(input_ids)`` returns.
            labels: ``(B, n)``, the ids themselves; they are shifted here. -100 is not predicted.
            use_cache: whether a cache is made where none is given, for texts of ``max_position_embeddings`` tokens.
            logits_to_keep: number of last tokens, or their places, whose logits are returned; 0: all.
            output_hidden_states: also return the hidden states: the embedding, every block's output, and behind the
                last norm in place of the last block's, as models of transformers do.
            return_dict: False for a tuple.
            skip_logits: leave the logits out, so that they never exist whole. If not given, in training with labels.
            num_items_in_batch: divides the sum of the losses, in place of the number of labels.
            cu_seq_lens_k: edges of packed documents, ``(documents + 1,)``.
            others: ``shift_labels``, labels that are shifted already. What the model does not know is refused.

        Raises:
            ConfigError, ShapeError: what the model does not compute.
        """
        # Not in the signature: Trainer would ask every evaluation batch for it.
        labels = _shifted(labels, others.pop("shift_labels", None))
        batch = _batch(input_ids, inputs_embeds)
        _check(others, labels is not None, cache)
        _check_columns(batch, attention_mask, position_ids, cache)
        hidden = bool(_given(output_hidden_states, self.config.output_hidden_states))
        if use_cache and cache is None:
            cache = LongNetCache(self.config.max_position_embeddings)
        if cache is None:
            ((_, rows),) = batch.items()
            edges = edges_of_batch(attention_mask, position_ids, cu_seq_lens_k, rows.shape[1])
            out = self.model(**batch, cu_seqlens=edges, hidden_states=hidden, head=False)
            last, states = out.last_hidden_state, out.hidden_states
        else:
            last, *states = cache.advance(self.model, batch, attention_mask, hidden)
        loss = None if labels is None else self._loss(last, labels, num_items_in_batch)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        skipped = _given(skip_logits, self.training and loss is not None)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=None if skipped else self.model.head(last[:, kept]),
            cache=cache,
            hidden_states=(*states[:-1], last) if hidden else None,
        )
        return result if _given(return_dict, self.config.return_dict) else result.to_tuple()

    def _loss(self, last: Tensor, labels: Tensor, items: int | Tensor | None) -> Tensor:
        """Return the mean cross-entropy of shifted labels; only some rows of logits exist at a time."""
        if labels.shape != last.shape[:2]:
            raise ShapeError(f"labels must be {tuple(last.shape[:2])} as the tokens, but are {tuple(labels.shape)}")
        labels = labels.to(last.device)
        total: Tensor = self.model.head(last, labels)
        count = (labels != IGNORE_INDEX).sum().clamp(min=1) if items is None else items
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding; it multiplies its rows by the root of the model dim."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embedding = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        """Return the head, whose ``weight`` is ``(V, E)``."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.model.head = new_embeddings  # type: ignore[assignment]

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Give the model another number of ids; return its embedding.

        Args:
            new_num_tokens: new ``vocab_size``; None: as it is.
            pad_to_multiple_of: round it up to a multiple.
            mean_resizing: new rows are the mean of the old ones; else drawn as in a new model.

        Raises:
            ConfigError: fewer than one id, or weights that are sharded over ranks.
        """
        model, old = self.model, self.config.vocab_size
        new = old if new_num_tokens is None else new_num_tokens
        new = new if pad_to_multiple_of is None else -(-new // pad_to_multiple_of) * pad_to_multiple_of
        if new < 1 or len(model.embedding.weight) != old:
            raise ConfigError(
                f"a model with {old} ids, of which this process has {len(model.embedding.weight)}, cannot have {new}; "
                f"resize it to at least 1 before it is sharded"
            )
        if new == old:
            return self.get_input_embeddings()
        tied = model.head.weight is model.embedding.weight
        model.embedding.weight = _resized(model.embedding.weight, new, mean_resizing)
        model.head.weight = model.embedding.weight if tied else _resized(model.head.weight, new, mean_resizing)
        self.config.vocab_size = new
        model.config = self.config.core_config()
        model.embedding.num_embeddings = model.head.vocab_size = new
        model.head.chunk = model.config.logits_rows
        return self.get_input_embeddings()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights alone: modules draw their own, and :meth:`from_pretrained` refuses files that lack some."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
        max_cache_length: int, *others: Any,
    ) -> None:  # fmt: skip
        """Make the cache of ``generate``; transformers calls it."""
        if generation_config.cache_implementation is not None:
            raise ConfigError(
                f"a LongNet has a cache of its own, not cache_implementation={generation_config.cache_implementation}; "
                f"leave it out"
            )
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = LongNetCache(max(1, max_cache_length))


def _checkpointable(model: LongNet) -> LongNet:
    """Let transformers switch gradient checkpointing on in the blocks."""
    for block in model.blocks:
        block.gradient_checkpointing = False  # type: ignore[assignment]
        block.engine = _run_block  # type: ignore[assignment]
    return model


def _run_block(
    block: Block,
    x: Tensor,
    start: int | None,
    total_rows: int | None,
    cache: LayerCache | None,
    documents: Documents | None,
) -> Tensor:
    """Compute a block; with gradient checkpointing, which transformers switches on in it, again in backward."""
    given = x, start, total_rows, cache, documents
    if block.gradient_checkpointing and block.training and cache is None:
        again: Tensor = checkpoint_function(block)(block.compute, *given)
        return again
    return block.compute(*given)


def _check(others: dict[str, Any], labelled: bool, cache: Any) -> None:
    if others.pop("output_attentions", None):
        raise ConfigError(
            "dilated attention never has its weights; leave output_attentions out, or use "
            "longnet_dist.attention_weights for some rows"
        )
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _REDUNDANT)
    if unknown:
        raise ConfigError(f"a LongNet has no use for {', '.join(unknown)}; leave it out")
    if cache is not None and not isinstance(cache, LongNetCache):
        raise ConfigError(f"the cache of a LongNet is a LongNetCache, not a {type(cache).__name__}; leave it out")
    if cache is not None and labelled:
        raise ConfigError("with a cache nothing is differentiated, so there is no loss; leave cache or labels out")


def _check_columns(
    batch: dict[str, Tensor], mask: Tensor | None, position_ids: Tensor | None, cache: LongNetCache | None
) -> None:
    """Refuse a mask or positions of other tokens than those that are given, with those in the cache."""
    ((name, rows),) = batch.items()
    if rows.dim() != (2 if name == "tokens" else 3):
        what = "input_ids must be (batch, tokens)" if name == "tokens" else "inputs_embeds must be (batch, tokens, E)"
        raise ShapeError(f"{what}, but are {tuple(rows.shape)}; give one text as a batch of one: x[None]")
    if name == "tokens" and rows.dtype not in (torch.int32, torch.int64):
        raise ShapeError(f"input_ids must be int64, but are {rows.dtype}; convert them with input_ids.long()")
    texts, columns = rows.shape[:2]
    seen = columns + (0 if cache is None else cache.seen)
    if mask is not None and tuple(mask.shape) != (texts, seen):
        raise ShapeError(
            f"a mask of padding is (batch, tokens so far), here {(texts, seen)}, not {tuple(mask.shape)}; give a mask "
            f"of all tokens, those in the cache too"
        )
    if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[1] != columns):
        raise ShapeError(
            f"position_ids must be those of the {columns} tokens, (batch, tokens), but are {tuple(position_ids.shape)}"
        )


def _given(value: bool | None, otherwise: bool) -> bool:
    return otherwise if value is None else value


def _batch(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> dict[str, Tensor]:
    """Return the one input under its name for LongNet."""
    given = {"tokens": input_ids, "inputs_embeds": inputs_embeds}
    found = {name: rows for name, rows in given.items() if rows is not None}
    if len(found) != 1:
        raise ShapeError("a model takes input_ids or inputs_embeds; give one of them")
    return found


def _shifted(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
    """Return the id that each token has to predict, -100 for none."""
    if labels is None or shift_labels is not None:
        return shift_labels
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]


def _resized(weight: Tensor, rows: int, mean: bool) -> nn.Parameter:
    """Return the weight with more or fewer rows."""
    kept = weight.detach()[:rows]
    new = kept.new_empty(rows - len(kept), kept.shape[1])
    if mean:
        new[:] = weight.detach().mean(0)
    else:
        nn.init.normal_(new, std=kept.shape[1] ** -0.5)
    return nn.Parameter(torch.cat([kept, new]), requires_grad=weight.requires_grad)
