"""The options of the engine, and how it is attached to a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from longnet_dist.config.schema import TrainConfig
from longnet_dist.engine.block_engine import BlockEngine
from longnet_dist.engine.saved_tensors import PinnedPool
from longnet_dist.model.block import Block
from longnet_dist.model.longnet import AnyModel
from longnet_dist.ops.matmul.choice import MatmulName

Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Execution:
    """Say how a model is computed; what it computes stays the same.

    Attributes:
        checkpointing: what a block saves for backward. ``none``: all that autograd does. ``selective``: its input and
            the attention's output. ``full``: its input.
        cache_qkv: number of final blocks that also save queries, keys and values, where the others are ``selective``.
        offload: whether saved activations wait in pinned host memory; not with ``none``.
        resident: number of final blocks whose saved activations stay on the device all the same; at least 1.
        offload_qkv: number of blocks, the first of those with ``cache_qkv``, whose queries, keys and values are
            offloaded as well.
        tile: tokens that row-wise parts process at once; None for all.
        compile: whether row-wise parts and the loss are compiled, in training and in streams.
        matmul: backend of the linear layers in compiled parts.
    """

    checkpointing: Checkpointing = "none"
    cache_qkv: int = 0
    offload: bool = False
    resident: int = 1
    offload_qkv: int = 0
    tile: int | None = None
    compile: bool = False
    matmul: MatmulName = "auto"

    @classmethod
    def of(cls, train: TrainConfig, device_type: str) -> Execution:
        """Build the execution that a run's configuration asks for on ``"cuda"`` or ``"cpu"``."""
        return cls(
            train.activation_checkpointing,
            train.cache_qkv,
            train.offload_activations,
            train.resident,
            train.offload_qkv,
            train.feed_forward_tile,
            train.compiles(device_type),
            train.matmul,
        )

    def attach(self, model: AnyModel) -> AnyModel:
        """Let the engine run the blocks of ``model`` this way; returns the model.

        With the default execution the blocks run as plain modules.
        """
        model.execution = self
        pool = PinnedPool(self.resident) if self.offload else None
        for block, execution in zip(model.blocks, self.of_blocks(len(model.blocks)), strict=True):
            assert isinstance(block, Block)
            block.engine = None if execution.plain else BlockEngine(execution, pool)
        return model

    @property
    def plain(self) -> bool:
        """Say whether the readable modules do all that is asked for."""
        return self.checkpointing == "none" and self.tile is None and not self.compile

    @property
    def saves_qkv(self) -> bool:
        """Say whether a block with this execution saves its queries, keys and values."""
        return self.checkpointing == "selective" and self.cache_qkv > 0

    def of_blocks(self, layers: int) -> list[Execution]:
        """Return the execution of each of ``layers`` blocks, in which ``cache_qkv`` and ``offload_qkv`` are 0 or 1."""
        first_cached, resident = layers - self.cache_qkv, layers - self.resident
        blocks = []
        for layer in range(layers):
            cached = self.checkpointing == "selective" and layer >= first_cached
            offloads_qkv = cached and layer < max(first_cached, 0) + self.offload_qkv
            offload = self.offload and layer < resident
            blocks.append(replace(self, cache_qkv=int(cached), offload_qkv=int(offloads_qkv), offload=offload))
        return blocks

    def compiles(self, training: bool, streamed: bool) -> bool:
        """Return whether a pass is compiled; other evaluations have too many shapes to compile for each."""
        return self.compile and (training or streamed)
