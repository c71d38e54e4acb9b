r"""The parameters and the FLOPs of a model follow from its configuration.

Model FLOPs count what the mathematics of a training step needs. What activation checkpointing recomputes is not
counted:

.. math::
    F_{token} = 6 P_{matmul} + 3 \cdot F_{attention}(N) / N

:math:`P_{matmul}` is the number of weights in the linear layers (projections, feed-forward, output projection; not the
embedding, which is a look-up). Each costs 2 FLOPs for a token in forward and 4 in backward. :math:`F_{attention}` is
the sum of ``DilatedPattern.flops`` over the layers: ``4 · D`` FLOPs for each (query, key) pair and head in forward;
backward counts twice as much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod

from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.config.model import LongNetConfig
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.optim.optimizers import OPTIMIZERS, Role, Shape


def num_parameters(model: LongNetConfig) -> int:
    """Count the parameters of a model; tied weights count once. The head of a task on features is not counted."""
    return sum(count * prod(shape) for _, shape, count in parameter_shapes(model))


def parameter_shapes(model: LongNetConfig) -> Iterator[tuple[Role, Shape, int]]:
    """Yield the role and shape of the parameters of a model, and how many are alike.

    Norms and biases are counted as vectors of one number each.
    """
    if isinstance(model, EncoderConfig):
        yield from _inputs_of_encoder(model)
    else:
        yield "embedding", (model.vocab_size + (model.mask_id is not None), model.dim), 1
    if not model.tie_embeddings and model.num_outputs:
        yield "head", (model.num_outputs, model.dim), 1
    for shape, number in Counter(model.block_matrices).items():
        yield "matrix", shape, number * model.layers
    yield "vector", (1,), model.outer_vectors + model.layers * model.block_vectors


def _inputs_of_encoder(model: EncoderConfig) -> Iterator[tuple[Role, Shape, int]]:
    if model.vocab_size is not None:
        yield "embedding", (model.vocab_size, model.dim), 1
    if model.feature_dim is not None:
        yield "matrix", (model.dim, model.feature_dim), 1
    if model.max_positions is not None:
        yield "embedding", (model.max_positions, model.dim), 1


def optimizer_numbers(model: LongNetConfig, optimizer: str) -> int:
    """Count the numbers that an optimizer keeps of all parameters, without master weights."""
    states = OPTIMIZERS[optimizer].states
    return sum(
        count * sum(prod(kept) for kept in states(role, shape).values())
        for role, shape, count in parameter_shapes(model)
    )


def block_parameters(model: LongNetConfig) -> int:
    """Count the parameters of a block: matrices, biases, norms and sinks."""
    return block_matrix_weights(model) + model.block_vectors


def block_matrix_weights(model: LongNetConfig) -> int:
    """Count the weights of a block's linear layers, without biases."""
    return sum(prod(shape) for shape in model.block_matrices)


def matrix_weights(model: LongNetConfig) -> int:
    """Count the weights that multiply every token: all linear layers and the head, without the embedding."""
    projection = model.feature_dim or 0 if isinstance(model, EncoderConfig) else 0
    return model.layers * block_matrix_weights(model) + model.dim * (model.num_outputs + projection)


def attention_flops(model: LongNetConfig, length: int) -> int:
    """Count the FLOPs of all layers' attention over a sequence of ``length`` tokens, in forward."""
    return sum(number * pattern_flops(model, pattern, length) for pattern, number in model.pattern_counts.items())


def pattern_flops(model: LongNetConfig, pattern: DilatedPattern, length: int) -> int:
    """Count the FLOPs of the attention of one layer with ``pattern``, in forward."""
    return pattern.flops(length, model.heads, model.head_dim, model.causal, model.kv_heads)


def forward_flops(model: LongNetConfig, length: int) -> int:
    """Count the FLOPs of a forward over a sequence of ``length`` tokens; a training step has three times as many."""
    return 2 * length * matrix_weights(model) + attention_flops(model, length)


def flops_per_token(model: LongNetConfig, length: int) -> float:
    """Return the model FLOPs of a training step for each token, in sequences of ``length`` tokens."""
    return 3 * forward_flops(model, length) / length
