"""DeepSpeed 0.19 keeps parameters, gradients and optimizer state, whose bytes depend on the ZeRO stage."""

from __future__ import annotations

from dataclasses import dataclass

from longnet_dist.config.deepspeed import REDUCE_BUCKET_NUMBERS
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.model_cost import block_matrix_weights, num_parameters, optimizer_numbers
from longnet_dist.optim.optimizers import OPTIMIZERS

WIDE = 4
STAGE_3_GATHERED = 1_000_000_000  # DeepSpeed's default of max_live_parameters and max_reuse_distance


@dataclass(frozen=True)
class State:
    """A State lists the bytes of parameters, gradients and optimizer on one rank.

    Attributes:
        parameters: parameters in the precision of the run.
        optimizer: float32 master weights (with bf16, or if sharded) and the optimizer's states, on the device.
        gathered: parameters that stage 3 has gathered during a pass.
        gradients_before: gradient buffers that exist all the time.
        gradients_after: all gradients at the end of a backward, with the bucket that is being reduced.
        gradients_at_update: gradients during the update, with the copies that it makes.
        host: optimizer and gradients in host memory.
    """

    parameters: int
    optimizer: int
    gathered: int
    gradients_before: int
    gradients_after: int
    gradients_at_update: int
    host: int


def state_of(layout: RunLayout) -> State:
    """Estimate the state of a rank from ZeRO stage, precision and offload."""
    number, itemsize, deepspeed = num_parameters(layout.config.model), layout.itemsize, layout.config.deepspeed
    shard = -(-number // layout.num_ranks)
    # torch's AdamW is not fused on a CPU, so its denominator is a tensor as large as the parameter group.
    unfused = 0 if layout.device_type == "cuda" or deepspeed.offload_optimizer else WIDE
    kept = optimizer_numbers(layout.config.model, layout.config.train.optimizer)
    if deepspeed.zero_stage == 0:
        gradients = itemsize * number
        return State(itemsize * number, WIDE * kept, 0, 0, gradients, gradients + unfused * number, 0)
    on_device = 0 if deepspeed.offload_optimizer else shard
    kept_of_shard = -(-kept // layout.num_ranks)
    host = 0 if on_device else WIDE * (2 * shard + kept_of_shard) + itemsize * shard
    optimizer = WIDE * (on_device + kept_of_shard) if on_device else 0
    # A CPU allocates only those pages of the bucket that are written.
    numbers = REDUCE_BUCKET_NUMBERS if layout.device_type == "cuda" else min(number, REDUCE_BUCKET_NUMBERS)
    bucket = numbers * (WIDE if deepspeed.zero_stage == 3 else itemsize)
    # The summed gradients of a shard, a flattened copy of them, and in float32 runs those that autograd made.
    update = on_device * ((3 if itemsize == WIDE else 2) * WIDE + unfused) + _gathered_matrices(layout)
    if deepspeed.zero_stage == 3:
        gathered, sums = itemsize * min(number, STAGE_3_GATHERED), WIDE * on_device + bucket
        return State(itemsize * shard, optimizer, gathered, sums, sums, sums + update, host)
    # At stage 1 with bf16, DeepSpeed takes its BF16_Optimizer, which sums all gradients unsharded and has no bucket.
    if deepspeed.zero_stage == 1 and itemsize < WIDE and on_device:
        sums = WIDE * number
        gradients = sums + itemsize * number
        update = gradients + 2 * unfused * shard + _gathered_matrices(layout)
        return State(itemsize * number, optimizer, 0, sums, gradients, update, host)
    sums = WIDE * (on_device if deepspeed.zero_stage == 2 or not on_device else number)
    return State(itemsize * number, optimizer, 0, 0, sums + bucket, update, host)


def _gathered_matrices(layout: RunLayout) -> int:
    """Return the bytes of all matrices, which some optimizers gather for an update, and of two shards of them."""
    if not OPTIMIZERS[layout.config.train.optimizer].gathers_matrices:
        return 0
    numbers = layout.config.model.layers * block_matrix_weights(layout.config.model)
    return WIDE * (numbers + 2 * -(-numbers // layout.num_ranks))
