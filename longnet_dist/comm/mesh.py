"""The ranks form a mesh of two axes, data × sequence; the sequence axis is the inner one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from longnet_dist.config.schema import ParallelConfig
from longnet_dist.errors import ConfigError
from longnet_dist.private_interfaces import set_group_timeout


@dataclass(frozen=True)
class MeshShape:
    """The mesh has ``data`` × ``sequence`` ranks, numbered ``rank = data_rank · sequence + sequence_rank``.

    Attributes:
        data: groups of ranks that work on different sequences.
        sequence: ranks that share a sequence.
    """

    # The sequence axis is the inner one because its ranks exchange keys and values in every layer, and neighbouring
    # ranks share the fastest links. Other ranks meet only in ZeRO's collectives.

    data: int
    sequence: int

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int) -> MeshShape:
        """Return the shape that the configuration asks for, with each ``auto`` resolved.

        Args:
            parallel: the section ``parallel`` of the configuration.
            world_size: number of ranks.

        Raises:
            ConfigError: data × sequence is not the number of ranks.
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
    """A Mesh says where one rank is in the mesh.

    Attributes:
        shape: ranks along each axis.
        data_rank: coordinate along the data axis: which sequences this rank works on.
        sequence_rank: coordinate along the sequence axis: which slice of these sequences it has.
        sequence_group: the ranks that share these sequences, in the order of their slices; None for one rank.
    """

    shape: MeshShape
    data_rank: int
    sequence_rank: int
    sequence_group: dist.ProcessGroup | None

    @classmethod
    def build(cls, shape: MeshShape, timeout: timedelta) -> Mesh:
        """Create the sequence groups and return the place of this rank.

        It is a collective of the world: every rank must call it, since torch creates all groups on all ranks.
        """
        data_rank, sequence_rank = divmod(dist.get_rank(), shape.sequence)
        return cls(shape, data_rank, sequence_rank, _sequence_group(shape, data_rank, timeout))

    @property
    def world_size(self) -> int:
        """Return the number of all ranks."""
        return self.shape.data * self.shape.sequence


def _sequence_group(shape: MeshShape, data_rank: int, timeout: timedelta) -> dist.ProcessGroup | None:
    """Create the sequence groups in the same order on every rank; return this rank's.

    The group is a separate one even where it equals the world: NCCL runs the collectives of a group one after another,
    and the keys of a layer must not wait for the gradients that ZeRO reduces.
    """
    if shape.sequence == 1:
        return None
    first_ranks = range(0, shape.data * shape.sequence, shape.sequence)
    groups = [
        dist.new_group(list(range(first, first + shape.sequence)), timeout, pg_options=_options(timeout))
        for first in first_ranks
    ]
    return cast(dist.ProcessGroup, groups[data_rank])  # of which this rank is a member


def _options(timeout: timedelta) -> Any:
    """Return NCCL options that give the transfers a CUDA stream of high priority.

    A transfer needs few thread blocks. Without priority they would queue behind the many of the attention kernels that
    it is to overlap with.
    """
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)  # type: ignore[attr-defined]
    set_group_timeout(options, timeout)
    return options
