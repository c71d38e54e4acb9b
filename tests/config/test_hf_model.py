"""``model.path``: what is read from config.json, what may be set beside it, and what is refused."""

import json

import pytest
from transformers import AutoModelForCausalLM, GptOssConfig, MistralConfig

from longnet_dist import DilatedPattern
from longnet_dist.config.loading import load_config, parse_config
from longnet_dist.errors import ConfigError
from longnet_dist.estimate.model_cost import num_parameters, optimizer_numbers
from longnet_dist.hf import dilate
from tests.hf.decoder.decoders import CONFIGS, PATTERN, SIZES

RUN = ["train.output_dir=run", "train.steps=1"]


def write(folder, config, **changes):
    """A folder with a config.json alone."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | changes))
    return folder


def load(folder, *words, pattern=PATTERN):
    return load_config(None, [f"model.path={folder}", *RUN, *pattern, *words])


@pytest.mark.parametrize("family", CONFIGS)
def test_sizes_are_those_of_the_model(tmp_path, family):
    fields = CONFIGS[family]()
    model = load(write(tmp_path, fields)).model
    weights = AutoModelForCausalLM.from_config(fields)
    assert num_parameters(model) == sum(parameter.numel() for parameter in weights.parameters())
    assert optimizer_numbers(model, "adamw") == 2 * num_parameters(model)
    assert model.head_dim == weights.model.layers[0].self_attn.head_dim
    assert (model.dim, model.layers, model.vocab_size) == (32, 2, 256)
    assert model.pattern == DilatedPattern((16, 32, 64), (1, 2, 4))


def test_a_run_stores_the_model_and_reads_it_back_without_the_folder(tmp_path):
    config = load(write(tmp_path / "model", CONFIGS["qwen3"]()))
    values = json.loads(json.dumps(config.model_dump(mode="json")))
    assert "dim" not in values["model"]
    (tmp_path / "model" / "config.json").unlink()
    assert parse_config(values) == config


def test_the_pattern_of_a_saved_model_is_the_default(tmp_path):
    fields = dilate(CONFIGS["llama"](), DilatedPattern((8, 24), (1, 3), "blocked"))
    folder = write(tmp_path, fields)
    assert load(folder, pattern=()).model.pattern == DilatedPattern((8, 24), (1, 3), "blocked")
    assert load(folder).model.pattern == DilatedPattern((16, 32, 64), (1, 2, 4))
    nothing = ("model.segment_lengths=null", "model.dilation_rates=null")
    assert load(folder, pattern=nothing).model.pattern == DilatedPattern((8, 24), (1, 3), "blocked")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.dim=64"], r"brings the sizes of its model, but model\.dim=64 is given too; beside model\.path only"),
        (["model.name=tiny"], r"model\.name='tiny' is given too"),
        (["train.activation_checkpointing=selective"], r"use train\.compile=auto and train\.activation_checkpointing="),
        (["train.compile=true"], r"train\.compile=true is for LongNet's own blocks"),
        (["train.length_warmup=4"], r"train\.length_warmup=4 is for LongNet's own blocks"),
        (["train.matmul=torch"], r"train\.matmul=torch is for LongNet's own blocks"),
        (["model.dilation_rates=null"], r"but has model\.segment_lengths alone; give model\.segment_lengths and model"),
        (["model.dilation_rates=[1]"], r"dilation_rates"),
    ],
)
def test_what_cannot_be_set_beside_a_model_is_named(tmp_path, words, message):
    folder = write(tmp_path, CONFIGS["qwen3"]())
    given = {word.partition("=")[0] for word in words}
    pattern = [word for word in PATTERN if word.partition("=")[0] not in given]
    with pytest.raises(ConfigError, match=message):
        load(folder, *words, pattern=pattern)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (CONFIGS["qwen3"], {"model_type": "bert"}, r"model_type llama, mistral, qwen2, qwen3, but the model has"),
        (lambda: GptOssConfig(), {}, r"has model_type='gpt_oss'"),
        (lambda: MistralConfig(**SIZES, sliding_window=16), {}, r"sliding_window=16"),
        (CONFIGS["llama"], {"attention_dropout": 0.1}, r"attention_dropout=0\.1; set it to 0"),
        (CONFIGS["llama"], {"quantization_config": {"quant_method": "fp8"}}, r"has a quantization_config"),
        (
            CONFIGS["llama"],
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            r"rope_type=dynamic changes the rotations",
        ),
        (CONFIGS["llama"], {"num_attention_heads": "many"}, r"transformers refuses the model's config\.json"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(tmp_path, config, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, config(), **changes))


def test_nothing_is_downloaded(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path=Qwen/Qwen3-0\.6B must be a folder of this machine"):
        load("Qwen/Qwen3-0.6B")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"must be a JSON object, not list"):
        load(tmp_path)


def test_a_model_without_a_pattern_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"needs a pattern without shifts, but has no pattern; give model\.segment"):
        load(write(tmp_path, CONFIGS["llama"]()), pattern=())
    file = write(tmp_path, CONFIGS["llama"]()) / "config.json"
    fields = json.loads(file.read_text())
    for own, what in (
        ({"segment_lengths": [8]}, "has a dilated_pattern without dilation_rates"),
        ([8], "has a dilated_pattern without segment_lengths, dilation_rates"),
        ({"segment_lengths": [8], "dilation_rates": [1], "shift": [3]}, "has a pattern with shifts"),
    ):
        file.write_text(json.dumps(fields | {"dilated_pattern": own}))
        with pytest.raises(ConfigError, match=rf"needs a pattern without shifts, but {what}; give model\.segment"):
            load(tmp_path, pattern=())


def test_a_model_of_transformers_is_no_init(tmp_path):
    folder = write(tmp_path, CONFIGS["llama"]())
    with pytest.raises(ConfigError, match=r"which a run trains as its own; give model\.path="):
        parse_config({"train": {"output_dir": "x", "steps": 1, "init": str(folder)}})
