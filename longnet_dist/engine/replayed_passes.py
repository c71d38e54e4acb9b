"""Training passes of a model, forward and backward, replayed as CUDA graphs.

A small model's kernels end before its host has launched the next ones: hundreds of launches, each from Python. A replay
is one. Gradients leave the graph by autograd as ever, so DeepSpeed's work on them stays outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longnet_dist.attention.positions import Positions
from longnet_dist.attention.stream import Stream
from longnet_dist.model.longnet import LongNet, LongNetOutput
from longnet_dist.model.loss import IGNORE_INDEX
from longnet_dist.numerics import log_once
from longnet_dist.ops.graphs import DifferentiableGraph

MOST_GRAPHS = 4
"""Shapes of batches that have a graph, each with memory of its own."""


class ReplayedPasses:
    """Stand in for a model's ``forward``: replay the passes that can be, and call it for all others.

    A pass can be replayed that trains on whole sequences of one rank, each of them one document. The model must have no
    hooks, and nothing random in it.

    Args:
        model: whose parameters stay where they are in memory.
    """

    def __init__(self, model: LongNet) -> None:
        self._model, self._forward = model, model.forward
        self._graphs: dict[tuple[torch.Size, int], DifferentiableGraph] = {}
        self._read: list[object] = []  # what the graphs read besides inputs and parameters

    @classmethod
    def attach(cls, model: LongNet) -> LongNet:
        """Let calls of ``model`` be replayed where they can be; returns the model."""
        model.forward = cls(model)  # type: ignore[method-assign, assignment]
        return model

    def __call__(self, tokens: Tensor | None = None, labels: Tensor | None = None, **options: Any) -> LongNetOutput:
        """Return what the model's forward returns for the same arguments."""
        graph = None
        if tokens is not None and labels is not None and self._can_be_replayed(options):
            graph = self._graph(tokens, labels, options["stream"].total_rows)
        if graph is None or tokens is None or labels is None:
            return self._forward(tokens, labels, **options)
        loss_sum, num_labels = graph(tokens, labels), (labels != IGNORE_INDEX).sum()
        return LongNetOutput(loss_sum / num_labels.clamp(min=1), None, loss_sum, num_labels)

    def _can_be_replayed(self, options: dict[str, Any]) -> bool:
        stream = options.get("stream")
        if not (self._model.training and torch.is_grad_enabled() and set(options) == {"stream"}):
            return False
        if not isinstance(stream, Stream) or stream.documents is not None or stream.num_ranks > 1:
            return False
        shards = stream.shards
        return stream.replaying and shards is not None and (shards.start, shards.stop) == (0, stream.total_rows)

    def _graph(self, tokens: Tensor, labels: Tensor, total_rows: int) -> DifferentiableGraph | None:
        """Return the graph of a batch of this shape; None if there are too many."""
        key = tokens.shape, total_rows
        if key not in self._graphs:
            if len(self._graphs) == MOST_GRAPHS:
                log_once(f"batches of more than {MOST_GRAPHS} shapes: those of the others are not replayed")
                return None
            parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
            self._graphs[key] = DifferentiableGraph(self._pass(total_rows), (tokens, labels), parameters)
            # An evaluation of another length lets go of the tables that the graph goes on reading.
            for attention in self._model.attentions:
                if isinstance(attention.positions, Positions):
                    self._read.append(attention.positions.kept)
        return self._graphs[key]

    def _pass(self, total_rows: int) -> Callable[[Tensor, Tensor], Tensor]:
        def loss_sum(tokens: Tensor, labels: Tensor) -> Tensor:
            stream = self._model.stream(total_rows)
            for _ in stream.record(total_rows):  # one chunk leaves nothing for others
                pass
            for _ in stream.replay(total_rows):
                found = self._forward(tokens, labels, stream=stream).loss_sum
            assert found is not None
            return found

        return loss_sum
