"""The engine's entry: it runs one block in place of the block's own modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longnet_dist.attention.decoding import Cache, DecodingLayer
from longnet_dist.engine.block_run import BlockRun
from longnet_dist.engine.recognition import obstacle
from longnet_dist.engine.rows import RowParts
from longnet_dist.engine.saved_tensors import PinnedPool, SavedTensors
from longnet_dist.geometry.documents import Documents
from longnet_dist.model.block import Block
from longnet_dist.numerics import log_once
from longnet_dist.ops.matmul.choice import REFERENCE, Matmul, choose_matmul

if TYPE_CHECKING:
    from longnet_dist.engine.execution import Execution


class BlockEngine:
    """Run one block as its execution says.

    Args:
        execution: the options of this block.
        pool: pinned memory that all blocks of a model share; None if none of them offloads.
    """

    def __init__(self, execution: Execution, pool: PinnedPool | None) -> None:
        self.execution, self.pool = execution, pool

    def __call__(
        self,
        block: Block,
        x: Tensor,
        start: int | None,
        total_rows: int | None,
        cache: Cache | None,
        documents: Documents | None,
    ) -> Tensor:
        """Return the block's output ``(B, n, E)`` for ``x (B, n, E)``; arguments as in :meth:`Block.forward`."""
        if isinstance(cache, DecodingLayer):  # one row of each text: nothing to tile, recompute or offload
            return block.compute(x, start, total_rows, cache, documents)
        reason = obstacle(block)
        if reason:
            log_once(f"blocks run as plain modules, without tiles, offloading and compiled parts: {reason}")
            return self._plain(block, x, start, total_rows, cache, documents)
        execution, attention = self.execution, block.self_attn
        spec, table = attention.prepare(x, start, total_rows, cache, documents)
        compile = execution.compiles(block.training, cache is not None)
        matmul = self._matmul(block, x) if compile else REFERENCE
        weights = dict(block.named_parameters())
        weights.pop("self_attn.sinks", None)  # no row-wise part has them
        parts = RowParts(weights, table, attention.head_dim, attention.norm_eps, execution.tile, compile, matmul)
        run = BlockRun(parts, spec, execution, (x.shape[0], x.shape[1]), self._saved_tensors(), attention.sinks)
        return run.forward(x.flatten(0, 1)).view_as(x)

    def _plain(
        self,
        block: Block,
        x: Tensor,
        start: int | None,
        total_rows: int | None,
        cache: Cache | None,
        documents: Documents | None,
    ) -> Tensor:
        """Call the block's own modules; with checkpointing torch recomputes all of them in backward.

        A chunk of a stream is not recomputed: that would leave its rows in the cache twice.
        """
        if self.execution.checkpointing == "none" or cache is not None or not torch.is_grad_enabled():
            return block.compute(x, start, total_rows, cache, documents)
        out: Tensor = checkpoint(block.compute, x, start, total_rows, cache, documents, use_reentrant=False)
        return out

    def _matmul(self, block: Block, x: Tensor) -> Matmul:
        layers = block.self_attn.q_proj, block.self_attn.k_proj, block.ffn.fc1
        widths = tuple(layer.out_features for layer in layers)
        return choose_matmul(self.execution.matmul, x.device, x.dtype, x.shape[0] * x.shape[1], widths)

    def _saved_tensors(self) -> SavedTensors | None:
        if not torch.is_grad_enabled():
            return None
        return self.pool.saved_tensors(self.execution.offload) if self.pool else SavedTensors()
