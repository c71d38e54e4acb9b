import pytest
from pydantic import ValidationError

from longnet_dist.config.loading import parse_config
from longnet_dist.config.schema import Config, ProfileConfig
from longnet_dist.errors import ConfigError


def values(**sections):
    sections.setdefault("train", {})
    sections["train"] = {"output_dir": "run", "steps": 10} | sections["train"]
    return {"model": {"name": "tiny"}, **sections}


def test_the_defaults_are_longnets():
    train = parse_config(values()).train
    assert (train.adam_betas, train.weight_decay, train.clip_norm) == ((0.9, 0.98), 0.01, 2.0)
    assert (train.learning_rate, train.warmup_steps, train.decay_power) == (6e-4, 750, 1.0)


def test_a_configuration_is_immutable():
    with pytest.raises(ValidationError):
        parse_config(values()).train.steps = 3


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"steps": 0}}, "train.steps=0 should be greater than 0"),
        (
            {"train": {"validate_every": None}},
            "train.validate_every=null should be a valid integer; train.validate_every is: steps between two "
            "validations, with another at the end; 0: never (default 500)",
        ),
        ({"train": {"steps": "many"}}, "train.steps='many' should be a valid integer"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate=nan"),
        ({"train": {"adam_betas": [0.9, 1.0]}}, "adam_betas must be at least 0 and below 1"),
        ({"train": {"final_learning_rate": 1.0}}, "use a smaller final_learning_rate"),
        ({"train": {"precision": "fp16"}}, "train.precision='fp16' should be 'fp32', 'bf16' or 'auto'"),
        ({"parallel": {"sequence": 0}}, "parallel.sequence=0 should be greater than 0, or should be 'auto'"),
        ({"deepspeed": {"zero_stage": 4}}, "deepspeed.zero_stage=4 should be 0, 1, 2 or 3"),
        ({"deepspeed": {"extra": {"gradient_clipping": 1}}}, "use train.clip_norm"),
        ({"deepspeed": {"extra": {"communication_data_type": "bf16"}}}, "would change how gradients are summed"),
        ({"deepspeed": {"extra": {"prescale_gradients": True}}}, "float32 sums that are divided once"),
        ({"train": {"precision": "bf16"}, "deepspeed": {"zero_stage": 0}}, "use deepspeed.zero_stage=1"),
        (
            {"train": {"activation_checkpointing": "selective", "cache_qkv": 2, "offload_qkv": 1}},
            "train.offload_activations is false; use offload_activations=true and cache_qkv=2",
        ),
        ({"train": {"offload_activations": True}}, "train.activation_checkpointing is none; use selective or full"),
        ({"train": {"resident_blocks": 3}}, "train.offload_activations is false; use train.offload_activations=true"),
        ({"train": {"activation_checkpointing": "some"}}, "should be 'none', 'selective' or 'full'"),
        ({"train": {"profile": {"first": 0}}}, "train.profile.first=0 should be greater than 0"),
        ({"train": {"profile": {"first": 9, "steps": 3}}}, "asks for steps 9 to 11 of a run of 10"),
        ({"train": {"profile": {"last": 3}}}, "the nearest is train.profile.steps"),
        ({"deepspeed": {"offload_optimizer": True, "zero_stage": 0}}, "needs deepspeed.zero_stage 1, 2 or 3, not 0"),
        ({"data": {"sequence_length": -5}}, "data.sequence_length=-5"),
        ({"model": {"name": "tiny", "causal": False}, "train": {"chunk_length": 9}}, "leave chunk_length out"),
        ({"model": {"name": "tiny", "heads": 5}}, "heads must divide dim"),
        ({"model": {"name": "huge"}}, "model name must be one of"),
    ],
)
def test_impossible_values_name_key_value_and_rule(sections, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(values(**sections))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_precision_follows_the_device_unless_given():
    assert parse_config(values()).precision("cpu") == "fp32"
    assert parse_config(values()).precision("cuda") == "bf16"
    assert parse_config(values(train={"precision": "fp32"})).precision("cuda") == "fp32"
    assert parse_config(values(train={"precision": "bf16"})).precision("cpu") == "bf16"


@pytest.mark.parametrize("section", [ProfileConfig, *(field.annotation for field in Config.model_fields.values())])
def test_every_key_is_documented(section):
    for key in section.model_fields:
        assert f"{key}: " in section.__doc__, f"{section.__name__}.{key} is not in the docstring"
