"""Whole weights and optimizer states of a DeepSpeed engine, out of ZeRO's shards and back into them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longnet_dist.private_interfaces import fragment_of


def full_tensor(engine: Any, parameter: nn.Parameter, state: str | None = None) -> Tensor:
    """Return the float32 master weight of a parameter, or a state of its optimizer, gathered from its shards.

    Every rank must call, for the same parameters in the same order; optimizer states exist after the first step.

    Args:
        engine: DeepSpeed's.
        parameter: of its model.
        state: a name of ``OptimizerRule.states``; None for the weight.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        return parameter.detach() if state is None else engine.optimizer.state[parameter][state]
    tensor: Tensor = (
        safe_get_full_fp32_param(parameter) if state is None else safe_get_full_optimizer_state(parameter, state)
    )
    return tensor


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the whole shape of a parameter; ZeRO stage 3 leaves an empty tensor in its place."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def held_range(engine: Any, parameter: nn.Parameter, numel: int) -> tuple[int, int]:
    """Return which numbers of a parameter, or of a state of it, this rank holds, as ``[first, last)``.

    Together the ranks hold each number once, but with ZeRO stage 0 each rank holds all.

    Args:
        engine: DeepSpeed's.
        parameter: of its model.
        numel: of the whole tensor.
    """
    if engine.zero_optimization_stage() == 0:
        return 0, numel
    if engine.zero_optimization_stage() == 3:
        shard: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        return min(dist.get_rank() * shard, numel), min((dist.get_rank() + 1) * shard, numel)
    return fragment_of(parameter)[0]


def held(engine: Any, parameter: nn.Parameter, state: str | None = None) -> Tensor:
    """Return the numbers of :func:`held_range` of the float32 master weight or of a state, one-dimensional.

    No other rank is needed; optimizer states exist after the first step.

    Args:
        engine: DeepSpeed's.
        parameter: of its model.
        state: a name of ``OptimizerRule.states``; None for the weight.
    """
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    stage = engine.zero_optimization_stage()
    if stage == 0:
        return full_tensor(engine, parameter, state).flatten()
    if stage == 3:
        get = safe_get_local_optimizer_state
        shard: Tensor = safe_get_local_fp32_param(parameter) if state is None else get(parameter, state)
        first, last = held_range(engine, parameter, whole_shape(parameter).numel())
        return shard[: last - first]
    _, fragment = fragment_of(parameter, state)
    return parameter.new_empty(0, dtype=torch.float32) if fragment is None else fragment


def set_held(engine: Any, parameter: nn.Parameter, value: Tensor, state: str | None = None) -> None:
    """Set what :func:`held` returns; optimizer states must exist.

    Args:
        engine: DeepSpeed's.
        parameter: of its model.
        value: float32, one-dimensional, the numbers of :func:`held_range`.
        state: a name of ``OptimizerRule.states``; None for the master weight.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    stage = engine.zero_optimization_stage()
    if stage == 0:
        whole = full_tensor(engine, parameter, state)
        whole.copy_(value.view(whole.shape))
    elif stage == 3:
        shard: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        value = nn.functional.pad(value, (0, shard - value.numel()))  # the last shards are padded
        if state is None:
            safe_set_local_fp32_param(parameter, value)
        else:
            safe_set_local_optimizer_state(parameter, value, state)
    else:
        _, fragment = fragment_of(parameter, state)
        if fragment is not None:
            fragment.copy_(value)


def set_optimizer_steps(engine: Any, steps: int) -> None:
    """Let the optimizer count on from ``steps``, as AdamW's bias correction does; Muon counts nothing."""
    for state in engine.optimizer.state.values():
        if "step" in state:
            state["step"].fill_(steps)


def allocate_optimizer_states(engine: Any) -> None:
    """Let an engine that has done no step yet have optimizer states, all zero; the weights stay as they are.

    torch's optimizers allocate their states in their first update. So they do one with gradients of zero and a learning
    rate of zero, on the float32 partitions that DeepSpeed lets them update. Nothing passes through the model.
    """
    optimizer = inner_optimizer(engine)
    groups = optimizer.param_groups
    rates, members = [group["lr"] for group in groups], [group["params"] for group in groups]
    for group, partitions in zip(groups, _partitions(engine.optimizer, members), strict=True):
        group["lr"], group["params"] = 0.0, partitions
    without = [partition for group in groups for partition in group["params"] if partition.grad is None]
    for partition in without:  # on the host there are buffers of zeros already
        partition.grad = torch.zeros_like(partition)
    optimizer.step()
    for partition in without:
        partition.grad = None
    for group, rate, parameters in zip(groups, rates, members, strict=True):
        group["lr"], group["params"] = rate, parameters
    link_optimizer_states(engine)


def inner_optimizer(engine: Any) -> Any:
    """Return the optimizer that was given to an engine; if ZeRO shards, DeepSpeed has it within its own."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _partitions(zero_optimizer: Any, members: list[list[Tensor]]) -> list[list[Tensor]]:
    """Return what the optimizer updates, by parameter group; stage 3 shows it the partitions only during a step."""
    flat = getattr(zero_optimizer, "fp32_partitioned_groups_flat", None)
    if flat is None:
        return members
    partitions: list[list[Tensor]] = [[] for _ in members]
    for number, partition in enumerate(flat):
        partitions[zero_optimizer.sub_group_to_group_id[number]].append(partition)
    return partitions


def link_optimizer_states(engine: Any) -> None:
    """Let :func:`full_tensor` find the optimizer states; call after they were allocated.

    DeepSpeed 0.19 does this itself after stepping the first parameter group, when the second has no state yet.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        groups, partitions = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    elif isinstance(optimizer, BF16_Optimizer):
        groups, partitions = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    else:
        return
    for parameters, partition in zip(groups, partitions, strict=True):
        lazy_init_hp_params_optimizer_state(parameters, partition, optimizer.state)
