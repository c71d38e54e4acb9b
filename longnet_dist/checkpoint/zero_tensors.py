"""Whole weights and optimizer states of a DeepSpeed engine, out of ZeRO's shards and back into them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq")


def full_tensor(engine: Any, parameter: nn.Parameter, state: str | None = None) -> Tensor:
    """The float32 master weight of a parameter, or one of ``OPTIMIZER_STATES``, gathered from its shards.

    Every rank must call, for the same parameters in the same order; optimizer states exist after the first step.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        return parameter.detach() if state is None else engine.optimizer.state[parameter][state]
    tensor: Tensor = (
        safe_get_full_fp32_param(parameter) if state is None else safe_get_full_optimizer_state(parameter, state)
    )
    return tensor


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The whole shape of a parameter; ZeRO stage 3 leaves an empty tensor in its place."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def set_full_tensor(engine: Any, parameter: nn.Parameter, value: Tensor, state: str | None = None) -> None:
    """The opposite of :func:`full_tensor`: every rank takes its shard from the whole ``value``."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    stage = engine.zero_optimization_stage()
    if stage == 0:
        full_tensor(engine, parameter, state).copy_(value)
        return
    if stage == 3:
        # DeepSpeed 0.19's own cut of a whole value does not know that the last shard may be padded.
        value = _padded_shard(value, parameter.ds_tensor.numel())  # type: ignore[attr-defined]
        set_weight, set_state = safe_set_local_fp32_param, safe_set_local_optimizer_state
    else:
        set_weight, set_state = safe_set_full_fp32_param, safe_set_full_optimizer_state
    if state is None:
        set_weight(parameter, value)
    else:
        set_state(parameter, value, state)


def set_optimizer_steps(engine: Any, steps: int) -> None:
    """Let AdamW's bias correction go on as after ``steps`` steps."""
    for state in engine.optimizer.state.values():
        state["step"].fill_(steps)


def link_optimizer_states(engine: Any) -> None:
    """Let :func:`full_tensor` find the optimizer states; call after the first step.

    DeepSpeed 0.19 does this itself after stepping the first parameter group, when the second has no state yet.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        for parameters, shard in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, shard, optimizer.state)


def _padded_shard(value: Tensor, shard_size: int) -> Tensor:
    flat = value.flatten()[dist.get_rank() * shard_size :][:shard_size]
    return nn.functional.pad(flat, (0, shard_size - flat.numel()))
