r"""Parameters and FLOPs of a model.

FLOPs that the mathematics of a training step needs, whatever is computed again:

.. math::
    F_{token} = 6 P_{matmul} + 3 L \cdot F_{attention}(N) / N

:math:`P_{matmul}` are the weights of all matrix products of a row (projections, feed-forward, output projection; not
the embedding, which is a look-up): 2 FLOPs a weight and row forward, 4 backward. :math:`F_{attention}` is
``DilatedPattern.flops``: ``4 · D`` for each attended (query, key) pair and head, forward; backward counts twice.
"""

from __future__ import annotations

from longnet_dist.config.model import LongNetConfig


def num_parameters(model: LongNetConfig) -> int:
    """Parameters of a :class:`~longnet_dist.LongNet`, each counted once."""
    embedding = (model.vocab_size + (model.mask_id is not None)) * model.dim
    head = 0 if model.tie_embeddings else model.vocab_size * model.dim
    return embedding + model.layers * block_parameters(model) + 2 * model.dim + head


def block_parameters(model: LongNetConfig) -> int:
    """Parameters of a block: matrices, their biases, norms."""
    dim, kv_dim, inner = model.dim, key_dim(model), inner_dim(model)
    biases = 2 * dim + 2 * kv_dim + inner + dim
    norms = 3 * 2 * dim + 2 * inner + (2 * model.head_dim if model.qk_norm else 0)
    return block_matrix_weights(model) + biases + norms


def block_matrix_weights(model: LongNetConfig) -> int:
    """Weights of a block's matrix products."""
    return 2 * model.dim * (model.dim + key_dim(model) + inner_dim(model))


def matrix_weights(model: LongNetConfig) -> int:
    """Weights of all matrix products of a row: projections, feed-forward and output, without the embedding."""
    return model.layers * block_matrix_weights(model) + model.dim * model.vocab_size


def attention_flops(model: LongNetConfig, rows: int) -> int:
    """FLOPs of one layer's attention over a sequence of ``rows`` rows, forward."""
    return model.pattern.flops(rows, model.heads, model.head_dim, model.causal, model.kv_heads)


def forward_flops(model: LongNetConfig, rows: int) -> int:
    """FLOPs of a forward over a sequence of ``rows`` rows; a training step counts three times as many."""
    return 2 * rows * matrix_weights(model) + model.layers * attention_flops(model, rows)


def flops_per_token(model: LongNetConfig, rows: int) -> float:
    """Model FLOPs of a training step for each token of sequences of ``rows`` rows."""
    return 3 * forward_flops(model, rows) / rows


def key_dim(model: LongNetConfig) -> int:
    """Numbers in a row's keys, ``Hkv · D``; as many in its values."""
    return (model.kv_heads or model.heads) * model.head_dim


def inner_dim(model: LongNetConfig) -> int:
    """Inner dim of the feed-forward network."""
    return model.ffn_dim or 4 * model.dim
