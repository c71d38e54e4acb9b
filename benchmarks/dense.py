"""The same models with full causal attention: what a user would pick otherwise."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from longnet_dist import LongNet
from longnet_dist.attention.decoding import Cache
from longnet_dist.engine.execution import Execution
from longnet_dist.engine.rows import RowParts
from longnet_dist.geometry.documents import Documents
from longnet_dist.model.block import Block


def make_dense(model: LongNet) -> LongNet:
    """Let all blocks of a causal model of one device attend to all earlier rows; positions must span them."""
    execution = model.execution if isinstance(model.execution, Execution) else Execution()
    for block in model.blocks:
        assert isinstance(block, Block)
        block.engine = DenseRunner(execution)
    return model


class DenseRunner:
    """Run a block with torch's attention, cuDNN's on a GPU; torch recomputes it whole where the model checkpoints."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution

    def __call__(
        self,
        block: Block,
        x: Tensor,
        start: int | None,
        total_rows: int | None,
        cache: Cache | None,
        documents: Documents | None,
    ) -> Tensor:
        """Return the block's output ``(B, n, E)``."""
        if self.execution.checkpointing == "none" or not torch.is_grad_enabled():
            return self._run(block, x)
        out: Tensor = checkpoint(self._run, block, x, use_reentrant=False)
        return out

    def _run(self, block: Block, x: Tensor) -> Tensor:
        execution, attention = self.execution, block.self_attn
        _, table = attention.prepare(x, None, None, None)
        weights = dict(block.named_parameters())
        parts = RowParts(weights, table, attention.head_dim, attention.norm_eps, execution.tile, execution.compile)
        rows = x.flatten(0, 1)
        q, k, v = (torch.unflatten(part, 0, x.shape[:2]).transpose(1, 2) for part in parts.graph_before(rows))
        with _backend(x):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return parts.graph_after(rows, out.transpose(1, 2).flatten(0, 1)).view_as(x)


def _backend(x: Tensor) -> AbstractContextManager[object]:
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if x.is_cuda and x.dtype != torch.float32 else nullcontext()
