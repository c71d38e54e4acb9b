"""A saved model says how it was trained, and its card says how to load it."""

import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import longnet_dist.hf as hf
from longnet_dist import DilatedPattern, LongNet, LongNetConfig
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.hf.causal_lm.export_folder import save_for_transformers
from tests.hf.decoder.decoders import SIZES, write_decoder
from tests.hf.decoder.test_export_and_plan import write_tokenizer

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


def run_card(folder, monkeypatch, capsys):
    """Run the Python of a card in its folder; return what it prints."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    return card, capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_the_card_of_a_dilated_model_loads_it(tmp_path, monkeypatch, capsys):
    folder = write_decoder(tmp_path, "llama")
    write_tokenizer(folder)
    model = hf.dilate(AutoModelForCausalLM.from_pretrained(folder), DilatedPattern((16, 1024), (1, 8)))
    model.config.use_cache = model.generation_config.use_cache = False
    hf.set_trained_length(model, 4096)
    model.save_pretrained(folder)
    hf.write_model_card(folder, 4096)
    config = AutoConfig.from_pretrained(folder)
    assert (config.max_position_embeddings, config.use_cache) == (4096, True)
    assert json.loads((folder / "generation_config.json").read_text()).get("use_cache", True)
    card, printed = run_card(folder, monkeypatch, capsys)
    assert printed.startswith("Once")
    assert "sequences of 4,096 tokens" in card
    assert "| 16 | 1 |\n| 1,024 | 8 |" in card


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attention", ["dilated", "full"])
def test_the_card_of_a_longnet_loads_it(tmp_path, monkeypatch, capsys, attention):
    config = LongNetConfig(
        vocab_size=256, dim=32, layers=2, heads=4, segment_lengths=[8, 32], dilation_rates=[1, 4], attention=attention
    )
    save_for_transformers(LongNet(config), tmp_path / "out", ByteTokenizer(), 64)
    card, printed = run_card(tmp_path / "out", monkeypatch, capsys)
    assert printed.startswith("Once")
    assert ("| 32 | 4 |" in card) == (attention == "dilated")
    assert ("attention of the layers is `full`" in card) == (attention == "full")


@pytest.mark.parametrize(("rope", "length"), [(None, 512), (YARN, 512), (DYNAMIC, 128)])
def test_the_length_changes_no_rotations(rope, length):
    """``dynamic`` follows ``max_position_embeddings``, which then stays what it was."""
    config = LlamaConfig(**SIZES, max_position_embeddings=128, rope_parameters=rope)
    before = AutoModelForCausalLM.from_config(config)
    hf.set_trained_length(config, 512)
    assert config.max_position_embeddings == length
    after = AutoModelForCausalLM.from_config(config)
    assert torch.equal(before.model.rotary_emb.inv_freq, after.model.rotary_emb.inv_freq)
    hf.set_trained_length(config, 64)
    assert config.max_position_embeddings == length
