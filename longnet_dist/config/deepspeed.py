"""This module alone writes DeepSpeed's configuration."""

from __future__ import annotations

from typing import Any

from longnet_dist.config.schema import Config, Precision

# Number of gradients that are reduced at once. DeepSpeed's default of 5e8 takes 2 GB even for a small model.
REDUCE_BUCKET_NUMBERS = 50_000_000
# DeepSpeed knows that ZeRO trains exactly with these. Of others ``OptimizerRule.zero_stages`` says it.
TESTED_OPTIMIZERS = ("adamw",)


def deepspeed_config(config: Config, precision: Precision, micro_batch_size: int, accumulation: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a run.

    DeepSpeed does not know of sequence parallelism. Without an ``mpu`` it averages gradients and shards its state over
    all ranks, which is exact for a loss that is scaled to the mean over all ranks (see ``train/step.py``).

    Args:
        config: the run.
        precision: precision of the run, with ``auto`` resolved for the device.
        micro_batch_size: sequences that a data rank computes at once.
        accumulation: micro-batches of a step.
    """
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.clip_norm,
        "zero_optimization": {
            "stage": config.deepspeed.zero_stage,
            "reduce_bucket_size": REDUCE_BUCKET_NUMBERS,
        },
        "steps_per_print": 2**62,  # the training loop reports metrics
    }
    if config.train.optimizer not in TESTED_OPTIMIZERS:
        result["zero_allow_untested_optimizer"] = True
    if config.deepspeed.offload_optimizer:
        result["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        # torch's fused AdamW runs on a CPU too. DeepSpeed's CPU optimizer would need a compiler on the machine.
        result["zero_force_ds_cpu_optimizer"] = False
    if precision == "bf16":
        result["bf16"] = {"enabled": True}
        # Gradients are summed over micro-batches and ranks in float32. In bf16 the error would grow with the ranks.
        result["data_types"] = {"grad_accum_dtype": "fp32"}
        result["communication_data_type"] = "fp32"
    return result | config.deepspeed.extra
