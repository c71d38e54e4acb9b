"""The mesh of ranks: data × sequence, the sequence ranks next to each other."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from longnet_dist.config.schema import ParallelConfig
from longnet_dist.errors import ConfigError


@dataclass(frozen=True)
class MeshShape:
    """How many ranks stand along each axis; ``rank = data_rank · sequence + sequence_rank``.

    The sequence axis is the inner one: its ranks exchange rows in every layer, and neighbours share the fastest links.
    """

    data: int
    sequence: int

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int) -> MeshShape:
        """The shape that the configuration asks for.

        Raises:
            ConfigError: it does not make up the world.
        """
        sequence = parallel.sequence if isinstance(parallel.sequence, int) else None
        data = parallel.data if isinstance(parallel.data, int) else max(1, world_size // (sequence or world_size))
        sequence = sequence or max(1, world_size // data)
        if data * sequence != world_size:
            raise ConfigError(
                f"data × sequence ranks must make up the world, but parallel.data={parallel.data} and "
                f"parallel.sequence={parallel.sequence} do not for {world_size} ranks; "
                f"use sizes whose product is {world_size}, or start {data * sequence} ranks"
            )
        return cls(data, sequence)


@dataclass(frozen=True)
class Mesh:
    """A rank's place in the mesh.

    Attributes:
        shape: ranks along each axis.
        data_rank: which sequences it works on.
        sequence_rank: which part of them.
        sequence_group: the ranks that work on the same sequences, in the order of rows; None if it is alone.
    """

    shape: MeshShape
    data_rank: int
    sequence_rank: int
    sequence_group: dist.ProcessGroup | None

    @classmethod
    def build(cls, shape: MeshShape, timeout: timedelta) -> Mesh:
        """Make the sequence groups, in the same order on every rank. Every rank of the world must call this."""
        data_rank, sequence_rank = divmod(dist.get_rank(), shape.sequence)
        return cls(shape, data_rank, sequence_rank, _sequence_group(shape, data_rank, timeout))

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.shape.data * self.shape.sequence


def _sequence_group(shape: MeshShape, data_rank: int, timeout: timedelta) -> dist.ProcessGroup | None:
    """A group of its own even where it is the world: rows need not queue behind the gradients of ZeRO."""
    if shape.sequence == 1:
        return None
    first_ranks = range(0, shape.data * shape.sequence, shape.sequence)
    groups = [
        dist.new_group(list(range(first, first + shape.sequence)), timeout, pg_options=_options(timeout))
        for first in first_ranks
    ]
    mine: dist.ProcessGroup = groups[data_rank]
    return mine


def _options(timeout: timedelta) -> Any:
    """On a GPU, let the few programs of a transfer go before the many of attention, beside which they run."""
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)  # type: ignore[attr-defined]
    options._timeout = timeout  # as torch itself does; it warns where this differs from the argument
    return options
