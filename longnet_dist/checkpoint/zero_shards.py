"""Which matrices ZeRO's flat shards are parts of, for an optimizer that updates whole matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class JoinedMatrices:
    """Describe shards of ZeRO 1 and 2: whole matrices lie one behind the other, and each rank has an equal share.

    Attributes:
        places: offset and shape of each matrix.
        ranks: among which the matrices are shared.
    """

    places: Sequence[tuple[int, torch.Size]]
    ranks: Any

    def per_matrix(self, shard: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return this rank's shard of ``function`` of each matrix; a rank computes those that it has a part of.

        All ranks must call; each receives the shards of the others, 4 bytes a number.
        """
        whole, begin = _gathered(shard, self.ranks).flatten(), dist.get_rank(self.ranks) * shard.numel()
        result = torch.zeros_like(shard)  # between matrices there may be padding
        for offset, shape in self.places:
            first, last = max(offset, begin), min(offset + prod(shape), begin + shard.numel())
            if first < last:
                value = function(whole[offset : offset + prod(shape)].view(shape)).flatten()
                result[first - begin : last - begin] = value[first - offset : last - offset]
        return result


@dataclass(frozen=True)
class SplitMatrices:
    """Describe shards of ZeRO 3: every matrix is padded and split over all ranks.

    Attributes:
        shapes: of the matrices, in the order of their parts in a shard.
        ranks: among which the matrices are split.
    """

    shapes: Sequence[torch.Size]
    ranks: Any

    def per_matrix(self, shard: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return this rank's shard of ``function`` of each matrix; every rank computes all.

        All ranks must call; each receives the shards of the others, 4 bytes a number.
        """
        whole, rank = _gathered(shard, self.ranks), dist.get_rank(self.ranks)
        result, offset = torch.zeros_like(shard), 0
        for shape in self.shapes:
            part = -(-prod(shape) // len(whole))
            matrix = whole[:, offset : offset + part].flatten()[: prod(shape)].view(shape)
            own = function(matrix).flatten()[rank * part :][:part]
            result[offset : offset + len(own)] = own
            offset += part
        return result


def shards_of_matrices(zero_optimizer: Any) -> Iterator[tuple[Tensor, JoinedMatrices | SplitMatrices]]:
    """Yield each flat float32 shard that DeepSpeed lets an optimizer update, with what it is a part of."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(zero_optimizer, DeepSpeedZeroOptimizer_Stage3):
        groups = zip(zero_optimizer.fp16_groups, zero_optimizer.sub_group_process_groups, strict=True)
        for shard, (parameters, ranks) in zip(zero_optimizer.fp32_partitioned_groups_flat, groups, strict=True):
            yield shard, SplitMatrices([parameter.ds_shape for parameter in parameters], ranks)
    elif isinstance(zero_optimizer, DeepSpeedZeroOptimizer):
        members = zip(zero_optimizer.round_robin_bit16_groups, zero_optimizer.round_robin_bit16_offsets, strict=True)
        for number, (parameters, offsets) in enumerate(members):
            places = [(offset, parameter.shape) for offset, parameter in zip(offsets, parameters, strict=True)]
            shard, ranks = zero_optimizer.single_partition_of_fp32_groups[number], zero_optimizer.real_dp_process_group
            yield shard, JoinedMatrices(places, ranks[number])
    elif isinstance(zero_optimizer, BF16_Optimizer):
        for number, parameters in enumerate(zero_optimizer.bf16_groups):
            places, offset = [], 0
            for parameter in parameters:
                places.append((offset, parameter.shape))
                offset += parameter.numel()
            shard, ranks = zero_optimizer.fp32_groups_flat_partition[number], zero_optimizer.real_dp_process_group
            yield shard, JoinedMatrices(places, ranks[number])


def _gathered(shard: Tensor, ranks: Any) -> Tensor:
    """Return the shards of all ranks, ``(ranks, numbers)``."""
    whole = shard.new_empty(dist.get_world_size(ranks), shard.numel())
    dist.all_gather(list(whole.unbind()), shard.contiguous(), ranks)
    return whole
