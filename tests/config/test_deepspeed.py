from longnet_dist.config.deepspeed import deepspeed_config
from longnet_dist.config.loading import parse_config

VALUES = {
    "model": {"name": "tiny"},
    "train": {"output_dir": "run", "steps": 10, "clip_norm": 0.5},
    "deepspeed": {"zero_stage": 2, "extra": {"wall_clock_breakdown": True}},
}


def test_optimizers_that_deepspeed_does_not_know_are_allowed():
    values = VALUES | {"train": VALUES["train"] | {"optimizer": "muon"}}
    assert deepspeed_config(parse_config(values), "fp32", 3, 2)["zero_allow_untested_optimizer"] is True


def test_what_deepspeed_is_told():
    written = deepspeed_config(parse_config(VALUES), "fp32", micro_batch_size=3, accumulation=2)
    assert written.pop("steps_per_print") > 10**9
    assert written == {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000},
        "wall_clock_breakdown": True,
    }


def test_bf16_sums_in_float32():
    written = deepspeed_config(parse_config(VALUES), "bf16", micro_batch_size=1, accumulation=1)
    assert written["bf16"] == {"enabled": True}
    assert written["data_types"] == {"grad_accum_dtype": "fp32"}
    assert written["communication_data_type"] == "fp32"


def test_an_offloaded_optimizer():
    section = VALUES["deepspeed"] | {"offload_optimizer": True}
    written = deepspeed_config(parse_config(VALUES | {"deepspeed": section}), "bf16", 1, 1)
    assert written["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert written["zero_force_ds_cpu_optimizer"] is False
