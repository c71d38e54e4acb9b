"""A block's next row of each of a few texts, as few kernels as there are parts that wait for each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from longnet_dist.attention.decoding import DecodingLayer
from longnet_dist.engine.recognition import obstacle
from longnet_dist.model.block import Block
from longnet_dist.ops.normed_linear.choice import normed_linear_of


def run_decoding(block: Block, x: Tensor, cache: DecodingLayer) -> Tensor:
    """Return what :meth:`Block.compute` returns for the next rows ``x (B, 1, E)`` of texts, without graph.

    A block that the engine does not recognise, or whose weights have other dtypes than the rows, runs as plain modules.
    """
    attention, ffn = block.self_attn, block.ffn
    dtypes = {weight.dtype for weight in block.parameters()}
    if dtypes != {x.dtype} or obstacle(block):
        return block.compute(x, None, None, cache, None)
    normed_linear = normed_linear_of(x.device, x.dtype, x.shape[0])
    rows, kv_dim = x[:, 0], attention.k_proj.out_features
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    joined = normed_linear(rows, block.self_attn_layer_norm, projections)
    q, k, v = (
        torch.unflatten(part, 1, (-1, attention.head_dim)).unsqueeze(1)
        for part in torch.split(joined, [joined.shape[1] - 2 * kv_dim, kv_dim, kv_dim], 1)
    )
    out = cache.attend(attention.q_norm(q), attention.k_norm(k), v, attention.sinks).flatten(1)
    y = normed_linear(out, attention.inner_attn_ln, [attention.out_proj], rows)
    h = normed_linear(y, block.final_layer_norm, [ffn.fc1], gelu=not ffn.style.gated)
    if ffn.style.gated:
        gate, up = h.chunk(2, -1)
        h = F.silu(gate) * up
    z: Tensor = normed_linear(h, ffn.ffn_layernorm, [ffn.fc2], y)
    return z.unsqueeze(1)
