"""What is done with a run on features: evaluation, embedding, export; and what needs text refuses it."""

import json
from datetime import timedelta

import pytest
import torch
from safetensors.torch import load_file

from longnet_dist.cli import evaluate, export, generate
from longnet_dist.cli.features import embed
from longnet_dist.comm.launch_env import process_group
from longnet_dist.errors import ConfigError, DataError
from longnet_dist.interop import from_torchscale, to_torchscale
from longnet_dist.model.encoder import LongNetEncoder
from longnet_dist.model.pretrained import from_pretrained, save_pretrained
from tests.train.features.slides import feature_config, run, write_slides


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has learned to classify, and its slides."""
    folder = write_slides(tmp_path_factory.mktemp("trained"))
    settings = "train.steps=20", "train.validate_every=20", "parallel.timeout_minutes=7"
    _, validations = run(1, feature_config(folder, folder / "run", *settings))
    return folder, validations[-1]


def call(command, *words):
    command.main([str(word) for word in words])


def test_evaluation_is_that_of_the_run(trained, capsys):
    folder, validation = trained
    call(evaluate, folder / "run", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found == pytest.approx({key: validation[key] for key in found}, rel=1e-5)
    assert found["sequences"] == 2
    others = write_slides(folder / "others", 6, seed=5)
    checkpoint = folder / "run" / "checkpoints" / "step_00000020"
    call(evaluate, checkpoint, "--data", others / "slides", "--labels", others / "labels.csv")
    shown = capsys.readouterr().out.split()
    assert shown[shown.index("accuracy") + 1] == "1.0000"
    assert shown[shown.index("sequences") + 1] == "6"


def test_evaluation_waits_for_ranks_as_long_as_the_run_says(trained, monkeypatch):
    waits = []

    def recorded(launch, device, timeout, store):
        waits.append(timeout)
        return process_group(launch, device, timeout, store)

    monkeypatch.setattr("longnet_dist.inference.runs.process_group", recorded)
    call(evaluate, trained[0] / "run")
    assert waits == [timedelta(minutes=7)]


def test_what_does_not_fit_is_refused(trained, tmp_path):
    folder = trained[0]
    with pytest.raises(ConfigError, match="need labels; give --labels"):
        call(evaluate, folder / "run", "--data", folder / "slides")
    with pytest.raises(ConfigError, match="--context is for language models"):
        call(evaluate, folder / "run", "--context", "4")
    data = "--data", folder / "slides", "--labels", folder / "labels.csv"
    with pytest.raises(DataError, match=r"has none of its 10 files; .* evaluate with --split all"):
        call(evaluate, folder / "run", *data, "--split", "validation")
    (tmp_path / "labels.csv").write_text("s1,strange\n")
    with pytest.raises(DataError, match="has the label strange, but the model knows even, odd"):
        call(evaluate, folder / "run", "--data", folder / "slides", "--labels", tmp_path / "labels.csv")
    with pytest.raises(ConfigError, match="is a run on features, which is no language model"):
        call(generate, folder / "run", "--prompt", "a")


def test_the_encoder_embeds_and_is_exported(trained, tmp_path, capsys):
    folder = trained[0]
    call(export, folder / "run", tmp_path / "exported")
    call(embed, folder / "run", folder / "slides", "--output", tmp_path / "a.safetensors")
    call(embed, tmp_path / "exported", folder / "slides", "--output", tmp_path / "b.safetensors")
    one, other = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert len(one) == 10
    assert all(torch.equal(one[name], other[name]) for name in one)
    # The exported head tells the class of the exported encoder's vectors.
    head = load_file(tmp_path / "exported" / "head.safetensors")
    classes = json.loads((tmp_path / "exported" / "classes.json").read_text())
    labels = dict(line.split(",") for line in (folder / "labels.csv").read_text().split())
    for name, vector in other.items():
        logits = vector @ head["head.weight"].T + head["head.bias"]
        assert classes[int(logits.argmax())] == labels[name]
    assert isinstance(from_pretrained(tmp_path / "exported"), LongNetEncoder)


def test_a_head_that_cannot_be_written_is_one_error(trained, tmp_path, monkeypatch):
    def save_with_obstacle(model, output):
        save_pretrained(model, output)
        (output / "head.safetensors").mkdir()

    monkeypatch.setattr("longnet_dist.inference.features.exported_task.save_pretrained", save_with_obstacle)
    with pytest.raises(ConfigError, match="cannot write the head to"):
        call(export, trained[0] / "run", tmp_path / "exported")


def test_a_pretrained_encoder_is_fine_tuned(trained, tmp_path):
    """A run on masked features, an exported folder and a run on classes begin from one another."""
    folder = trained[0]
    masked = feature_config(folder, tmp_path / "masked", "train.steps=2", classify=False)
    run(1, masked)
    words = "train.steps=1", "train.learning_rate=1e-9", "train.validate_every=0", "model.dropout=0.1"
    tuned = feature_config(folder, tmp_path / "tuned", f"train.init={tmp_path / 'masked'}", *words, model={})
    assert tuned.model.model_dump() == masked.model.model_dump() | {"dropout": 0.1}
    run(1, tuned)
    before, after = (
        load_file(tmp_path / name / "checkpoints" / f"step_0000000{step}" / "model.safetensors")
        for name, step in (("masked", 2), ("tuned", 1))
    )
    for name in (name for name in before if name.startswith("encoder.")):
        torch.testing.assert_close(after[name], before[name])
    assert after["head.weight"].shape == (2, 32)
    call(export, tmp_path / "masked", tmp_path / "folder")
    run(1, feature_config(folder, tmp_path / "again", f"train.init={tmp_path / 'folder'}", *words, model={}))


def test_a_converted_decoder_is_refused_by_what_needs_text(tmp_path):
    from longnet_dist import EncoderConfig

    fields = {"dim": 16, "layers": 1, "heads": 2, "segment_lengths": [8], "dilation_rates": [1]}
    config = EncoderConfig(
        vocab_size=20,
        outputs=20,
        causal=True,
        positions="xpos",
        activation_float32=True,
        head_offsets="blocked",
        **fields,
    )
    state, keywords = to_torchscale(LongNetEncoder(config))
    save_pretrained(from_torchscale(state, keywords, decoder=True), tmp_path / "decoder")
    with pytest.raises(ConfigError, match="is a model of another program, for 20 ids of a tokenizer"):
        call(generate, tmp_path / "decoder", "--prompt", "a")
    with pytest.raises(ConfigError, match="is a model of another program, for 20 ids of a tokenizer"):
        call(evaluate, tmp_path / "decoder", "--data", tmp_path / "a.tokens", "--context", "4")
    with pytest.raises(ConfigError, match="give --data TOKEN_FILE, and --context N or --stream"):
        call(evaluate, tmp_path / "decoder")
