"""How accelerate and Trainer give all ranks of a sequence group the same batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.distributed as dist

from longnet_dist.errors import ConfigError

_PATCHED = "deals_whole_batches"


def parallelism_config(group: dist.ProcessGroup) -> Any:
    """Return the ``ParallelismConfig`` of accelerate by which the ranks of a group get the same batches.

    ::

        accelerator = Accelerator(parallelism_config=hf.parallelism_config(group))

    ``TrainingArguments`` takes it too; ``Trainer`` finds it by itself. Different groups get different batches, and the
    gradients of all ranks are averaged, by DDP or ZeRO.

    Args:
        group: of this rank: ranks ``i·P … (i+1)·P-1`` of the world, in this order.

    Raises:
        ConfigError: other ranks than these.
    """
    from accelerate import ParallelismConfig
    from torch.distributed.device_mesh import init_device_mesh

    ranks, world = dist.get_process_group_ranks(group), dist.get_world_size()
    size, first = len(ranks), ranks[0]
    if world % size or first % size or ranks != list(range(first, first + size)):
        raise ConfigError(
            f"accelerate deals batches to groups of neighbouring ranks of one size, but the group has ranks {ranks} of "
            f"{world}; make groups of ranks i*P to (i+1)*P-1"
        )

    class _SameBatches(ParallelismConfig):  # type: ignore[misc]
        """Ask for a mesh whose last dimension gets the same batches; accelerate knows such a one as "tp" alone."""

        def build_device_mesh(self, device_type: str) -> Any:
            shape: tuple[int, ...] = (world // size, size)
            names: tuple[str, ...] = ("dp_replicate", "tp")
            if world > size:
                # Where rank 0 reads an iterable data set for all, accelerate knows no groups and refuses "dp".
                shape, names = (world // size, 1, size), ("dp_replicate", "dp", "tp")
            return init_device_mesh(device_type, shape, mesh_dim_names=names)

    return _SameBatches()


def deal_whole_batches(group_of: Callable[[Any], dist.ProcessGroup | None]) -> None:
    """Let ``transformers.Trainer`` deal whole batches to the groups of sequence-parallel models.

    Args:
        group_of: gives the group of a model, None for any other model.
    """
    from transformers import Trainer

    original = Trainer.create_accelerator_and_postprocess
    if hasattr(original, _PATCHED):
        return

    @wraps(original)
    def create_accelerator_and_postprocess(self: Any) -> None:
        group = group_of(self.model)
        if group is None or self.args.parallelism_config is not None or dist.get_world_size(group) == 1:
            original(self)
            return
        self.args.parallelism_config = parallelism_config(group)
        try:
            original(self)
        finally:
            self.args.parallelism_config = None

    setattr(create_accelerator_and_postprocess, _PATCHED, True)
    Trainer.create_accelerator_and_postprocess = create_accelerator_and_postprocess
