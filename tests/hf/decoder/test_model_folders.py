"""Folders of transformers are evaluated and continued as runs are; what cannot be says what to do."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import longnet_dist.hf as hf
from longnet_dist import DilatedPattern
from longnet_dist.cli import evaluate, export, generate, prepare
from longnet_dist.data.token_file import TokenFile
from longnet_dist.errors import CheckpointError, ConfigError, DataError
from longnet_dist.train.setup import RunSetup
from tests.hf.decoder.decoders import decoder_config, write_decoder
from tests.hf.decoder.test_export_and_plan import write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models with their tokenizer, plain and dilated, and a text of it."""
    folder = tmp_path_factory.mktemp("folders")
    write_decoder(folder / "plain", "llama")
    model = hf.dilate(AutoModelForCausalLM.from_pretrained(folder / "plain"), DilatedPattern((16, 64), (1, 4)))
    model.save_pretrained(folder / "dilated")
    for name in ("plain", "dilated"):
        write_tokenizer(folder / name)
    (folder / "text.txt").write_text("".join(f"line {number} of a text\n" for number in range(100)))
    tokenizer = folder / "plain" / "tokenizer.json"
    words = [str(folder / "text.txt"), "--output", str(folder / "data"), "--tokenizer", str(tokenizer)]
    prepare.main([*words, "--workers", "1", "--validation", "0.2"])
    return folder


@pytest.mark.parametrize("name", ["plain", "dilated"])
def test_a_folder_has_the_loss_of_transformers(folder, name, capsys):
    """Without a pattern the attention is full, as in transformers."""
    words = [str(folder / name), "--data", str(folder / "data"), "--tokens", "128", "--json"]
    evaluate.main([*words, "--context", "128"])
    evaluate.main([*words, "--split", "validation", "--stream", "--chunk", "48", "--state", str(folder / name / "s")])
    whole, streamed = (json.loads(line)["128"]["loss"] for line in capsys.readouterr().out.splitlines())
    model = AutoModelForCausalLM.from_pretrained(folder / name).eval()
    file = TokenFile.open(folder / "data")
    first, _ = file.split("validation")
    tokens = torch.from_numpy(file.tokens[first : first + 129].astype("int64"))[None]
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).logits[0], tokens[0, 1:]).item()
    assert whole == pytest.approx(expected, rel=1e-5)
    assert streamed == pytest.approx(expected, rel=1e-5)


def test_a_plain_folder_writes_text(folder, capsys):
    generate.main([str(folder / "plain"), "--prompt", "line", "--tokens", "4", "--temperature", "0"])
    assert capsys.readouterr().out.startswith("line")


def test_what_is_no_model_says_what_to_do(folder, tmp_path):
    other = shutil.copytree(folder / "plain", tmp_path / "other")
    (other / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json, which longnet reads; write it in Python, MOD"):
        generate.main([str(other), "--prompt", "line"])
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"model_type": "gemma"}))
    words = [str(other), "--data", str(folder / "data"), "--context", "8"]
    with pytest.raises(ConfigError, match=r"model_type='gemma', but longnet reads .*run --model hf --model_args"):
        evaluate.main(words)
    prepare.main([str(folder / "text.txt"), "--output", str(tmp_path / "bytes"), "--workers", "1"])
    with pytest.raises(DataError, match=r"another tokenizer .*; prepare it with --tokenizer .*/plain/tokenizer\.json"):
        evaluate.main([str(folder / "plain"), "--data", str(tmp_path / "bytes"), "--context", "8"])
    with pytest.raises(CheckpointError, match=r"there is no meta-llama/Llama; .*hf download NAME"):
        generate.main(["meta-llama/Llama", "--prompt", "line"])
    with pytest.raises(ConfigError, match="is a model of transformers, not a run that trained one"):
        export.main([str(folder / "dilated"), str(tmp_path / "out"), "--to", "hf"])


def test_tokens_of_another_tokenizer_are_refused(folder, tmp_path):
    prepare.main([str(folder / "text.txt"), "--output", str(tmp_path / "bytes"), "--workers", "1"])
    message = rf"data\.path={tmp_path}/bytes has the tokenizer bytes \(SHA-256 .* another one .*--tokenizer .*/plain/"
    with pytest.raises(ConfigError, match=message):
        RunSetup.make(decoder_config(folder / "plain", tmp_path / "run", tmp_path / "bytes"), 1, "cpu")
    with pytest.raises(ConfigError, match=r"the default text has the tokenizer bytes"):
        RunSetup.make(decoder_config(folder / "plain", tmp_path / "run", "null"), 1, "cpu")
    assert not (tmp_path / "run").exists()
    meant = decoder_config(folder / "plain", tmp_path / "run", tmp_path / "bytes", "train.ignore_tokenizer=true")
    plan = RunSetup.make(meant, 1, "cpu")
    assert plan.changes(plan.token_file) == [f"another tokenizer than that of {folder / 'plain'}"]


def test_truncation_and_a_file_without_tokenizer_are_no_other_tokenizer(folder, tmp_path):
    """Trainers write their truncation into tokenizer.json; it changes no token."""
    source = shutil.copytree(folder / "plain", tmp_path / "source")
    fields = json.loads((source / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (source / "tokenizer.json").write_text(json.dumps(fields | {"truncation": cut}))
    config = decoder_config(source, tmp_path / "run", folder / "data")
    plan = RunSetup.make(config, 1, "cpu")
    assert plan.changes(plan.token_file) == []
    (source / "tokenizer.json").unlink()
    (line,) = RunSetup.make(config, 1, "cpu").changes(plan.token_file)
    assert "whose tokenizer is not known and is not compared" in line
