"""The one place that writes DeepSpeed's configuration."""

from __future__ import annotations

from typing import Any

from longnet_dist.config.schema import Config, Precision

# Gradients that are reduced at once. DeepSpeed's own 5e8 take 2 GB of float32 from a small model too.
REDUCE_BUCKET_NUMBERS = 50_000_000


def deepspeed_config(config: Config, precision: Precision, micro_batch_size: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's dictionary for a run.

    DeepSpeed is told nothing of sequence parallelism: without an ``mpu`` it averages gradients and shards its state
    over all ranks, which is exact for a loss that is scaled to the mean over all ranks (see ``train/step.py``).

    Args:
        config: the run.
        precision: as resolved for the device.
        micro_batch_size: sequences that a data rank holds at once.
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
        "steps_per_print": 2**62,  # the loop reports, DeepSpeed does not
    }
    if config.deepspeed.offload_optimizer:
        result["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        # torch's fused AdamW runs on a CPU too; DeepSpeed's own would first be compiled on the machine.
        result["zero_force_ds_cpu_optimizer"] = False
    if precision == "bf16":
        result["bf16"] = {"enabled": True}
        # Sums over micro-batches and over ranks in float32: in bf16 their error would grow with the number of ranks.
        result["data_types"] = {"grad_accum_dtype": "fp32"}
        result["communication_data_type"] = "fp32"
    return result | config.deepspeed.extra
