"""The arguments of a call of a sequence-parallel model: what is whole, what is cut, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from longnet_dist.attention.validation import gather_facts
from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.hf.parallel.sequence_slice import SequenceSlice
from longnet_dist.model.loss import IGNORE_INDEX

_CUT = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")
_WHOLE = ("attention_mask", "labels", "shift_labels", "cu_seq_lens_q", "cu_seq_lens_k")
_DROPPED = ("max_length_q", "max_length_k", "use_cache", "return_dict", "num_items_in_batch")
_REFUSED = {
    "cache": "a cache of keys",
    "past_key_values": "a cache of keys",
    "logits_to_keep": "a choice of logits",
    "encoder_hidden_states": "cross-attention",
    "output_router_logits": "the loss of a router",
}


class WholeBatch:
    """Hold the arguments of a call ``model(input_ids (B, N), …)``, equal on all ranks of a group.

    Args:
        function: the forward method of transformers.
        args, kwargs: of the call, without the model.
        group: the sequence-parallel group; None for one device.

    Raises:
        ConfigError: an argument that cannot be cut into slices.
        ShapeError: ranks whose batches differ, on all ranks alike; a mask with gaps.
    """

    def __init__(
        self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], group: dist.ProcessGroup | None
    ) -> None:
        signature = inspect.signature(function)
        bound = dict(signature.bind(None, *args, **kwargs).arguments)
        self.takes_cache = "use_cache" in signature.parameters
        for name, parameter in signature.parameters.items():
            if parameter.kind == parameter.VAR_KEYWORD:
                bound.update(bound.pop(name, {}))
        bound.pop("self")
        self.given: dict[str, Any] = {name: value for name, value in bound.items() if value is not None}
        _refuse(self.given)
        tokens = self.given.get("input_ids", self.given.get("inputs_embeds"))
        if not isinstance(tokens, Tensor) or tokens.dim() < 2 or not tokens.shape[1]:
            raise ShapeError("a sequence-parallel model needs input_ids (batch, tokens) or inputs_embeds with a token")
        self.batch, self.rows, self.device = tokens.shape[0], tokens.shape[1], tokens.device
        if group is not None and dist.get_world_size(group) > 1:
            _compare(self.given, tokens, group)
        get = self.given.get
        self.slice = SequenceSlice.of(
            self.rows, group, get("attention_mask"), get("position_ids"), get("cu_seq_lens_k")
        )

    def cut(self) -> dict[str, Any]:
        """Return the arguments of the call that computes this rank's slice, without labels."""
        left_out = (*_WHOLE, *_DROPPED, *_REFUSED)
        inner = {name: value for name, value in self.given.items() if name not in left_out}
        inner.setdefault("position_ids", torch.arange(self.rows, device=self.device)[None])
        for name in _CUT:
            if name in inner:
                inner[name] = self.slice.cut(inner[name])
        if self.takes_cache:
            inner["use_cache"] = False
        return inner | {"return_dict": True, "sequence_slice": self.slice}

    def labels(self, shifted: bool) -> tuple[Tensor, Tensor] | None:
        """Return this rank's labels ``(B, n)`` and the number of all labels; None without labels.

        Args:
            shifted: whether a token's label is the next token: at a slice's end, that is the next rank's first.
        """
        labels: Tensor | None = self.given.get("labels")
        if shifted and "shift_labels" in self.given:
            labels = self.given["shift_labels"]
        elif shifted and labels is not None:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        if labels is None:
            return None
        if tuple(labels.shape) != (self.batch, self.rows):
            raise ShapeError(
                f"labels must be whole, {(self.batch, self.rows)} as the tokens, but are {tuple(labels.shape)}"
            )
        count = self.given.get("num_items_in_batch")
        if count is None:
            count = (labels != IGNORE_INDEX).sum()
        return self.slice.cut(labels, IGNORE_INDEX), torch.as_tensor(count, device=self.device)


def _refuse(given: Mapping[str, Any]) -> None:
    for name, what in _REFUSED.items():
        value = given.get(name, 0)
        if not isinstance(value, int) or value:
            raise ConfigError(
                f"a sequence-parallel model computes whole sequences from their tokens, without {what}, but {name} is "
                f"given; leave it out"
            )
    for name, value in given.items():
        if isinstance(value, Tensor) and name not in (*_CUT, *_WHOLE, *_DROPPED):
            raise ConfigError(
                f"a sequence-parallel model cannot cut {name} {tuple(value.shape)} into slices; it takes "
                f"{', '.join((*_CUT, *_WHOLE))}"
            )


def _compare(given: Mapping[str, Any], tokens: Tensor, group: dist.ProcessGroup) -> None:
    """Raise ShapeError unless all ranks have the same batch; one small collective, which all ranks make."""
    names = (*_CUT, *_WHOLE)
    table = gather_facts([_digest(given.get(name)) for name in names], tokens.device, group)
    for rank, row in enumerate(table):
        other = [name for name, x, y in zip(names, row, table[0], strict=True) if x != y]
        if other:
            raise ShapeError(
                f"all ranks of a sequence group must get the same whole batch, but rank {rank} of the group has other "
                f"{', '.join(other)} than rank 0; give Accelerator or TrainingArguments "
                f"parallelism_config=hf.parallelism_config(group), or let each rank read the same samples"
            )


def _digest(value: Any) -> int:
    """Return an integer that is equal for equal tensors, and likely different for others; of floats, of the shape."""
    if value is None:
        return 0
    shape = 1
    for size in value.shape:
        shape = (shape * 1_000_003 + size) % 2**31
    if value.is_floating_point():
        return shape
    flat = value.reshape(-1).to(torch.int64)
    place = torch.arange(1, len(flat) + 1, device=flat.device)
    return shape ^ int(((flat + 1) * (place * 2_654_435_761 % 2**31)).sum() & (2**62 - 1))
