"""The command classifies the files of a folder as the run that it is given does, and so does its export."""

import csv
import json

import pytest
import torch
from safetensors.torch import save_file

from longnet_dist.cli import evaluate, export
from longnet_dist.cli.features import predict
from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.errors import CheckpointError, ConfigError, DataError
from longnet_dist.inference.features import prediction
from longnet_dist.inference.features.exported_task import save_task
from longnet_dist.model.encoder import LongNetEncoder
from longnet_dist.model.feature_tasks.classification import Classification
from longnet_dist.model.feature_tasks.masked_features import MaskedFeatures
from longnet_dist.model.pretrained import save_pretrained
from tests.train.features.slides import MODEL, feature_config, run, write_slides


def call(command, *words):
    command.main([str(word) for word in words])


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has learned to classify, its export, and slides that it has not seen."""
    folder = write_slides(tmp_path_factory.mktemp("trained"))
    run(1, feature_config(folder, folder / "run", "train.steps=20", "train.validate_every=20"))
    call(export, folder / "run", folder / "exported")
    write_slides(folder / "new", 6, seed=5)
    return folder


def test_predictions_are_those_of_the_run(trained, tmp_path, capsys):
    slides, truth = trained / "new" / "slides", (trained / "new" / "labels.csv").read_text().split()
    for name in ("run", "exported"):
        call(predict, trained / name, slides, "--output", tmp_path / f"{name}.csv")
        shown = capsys.readouterr().out
        assert shown == f"6 new predictions in {tmp_path / name}.csv, which has 3 even, 3 odd\n"
    rows = rows_of(tmp_path / "run.csv")
    assert list(rows[0]) == ["name", "label", "probability_even", "probability_odd"]
    assert [f"{row['name']},{row['label']}" for row in rows] == truth
    assert all(float(row["probability_even"]) + float(row["probability_odd"]) == pytest.approx(1) for row in rows)
    assert (tmp_path / "run.csv").read_text() == (tmp_path / "exported.csv").read_text()
    # The loss follows from the probabilities.
    call(evaluate, trained / "exported", "--data", slides, "--labels", trained / "new" / "labels.csv", "--json")
    found = json.loads(capsys.readouterr().out)
    losses = [-torch.tensor(float(row[f"probability_{row['label']}"])).log() for row in rows]
    assert found["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    assert (found["accuracy"], found["sequences"]) == (1.0, 6)


def test_new_files_are_added_and_files_that_fail_are_named(trained, tmp_path, monkeypatch, capsys):
    folder, output = write_slides(tmp_path / "more", 4, seed=5) / "slides", tmp_path / "out" / "predictions.csv"
    torch.save({"features": torch.zeros(5, 11), "coords": torch.zeros(5, 2)}, folder / "narrow.pt")
    with pytest.raises(DataError, match=r"1 of 5 files have no result(.|\n)*narrow.pt: .* has 11 channels"):
        call(predict, trained / "run", folder, "--output", output)
    assert [row["name"] for row in rows_of(output)] == ["s0", "s1", "s2", "s3"]
    (folder / "narrow.pt").rename(folder / "narrow.txt")
    (folder / "s3.npy").rename(folder / "zz.npy")
    (folder / "s3.coords.npy").rename(folder / "zz.coords.npy")
    read, original = [], prediction.encode_file
    monkeypatch.setattr(
        prediction, "encode_file", lambda encoder, file: read.append(file.path.stem) or original(encoder, file)
    )
    call(predict, trained / "run", folder, "--output", output)
    assert read == ["zz"]
    assert "1 new predictions" in (shown := capsys.readouterr()).out
    assert "left out: 1" in shown.err
    assert [row["name"] for row in rows_of(output)] == ["s0", "s1", "s2", "s3", "zz"]


def test_outputs_of_another_model_and_damaged_ones_are_not_continued(trained, tmp_path):
    slides, output = trained / "new" / "slides", tmp_path / "predictions.csv"
    call(predict, trained / "run", slides, "--output", output)
    with pytest.raises(CheckpointError, match=r"was made with dtype=torch\.float32, but here dtype=torch\.bfloat16"):
        call(predict, trained / "run", slides, "--output", output, "--precision", "bf16")
    whole = output.read_text()
    for text in ("", whole.replace("probability_odd", "other"), whole + "a\n", whole + "a,odd,x,y\n"):
        output.write_text(text)
        with pytest.raises(CheckpointError, match="is no file that longnet predict wrote, or is damaged"):
            call(predict, trained / "run", slides, "--output", output)
        assert output.read_text() == text
    (tmp_path / "predictions.csv.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="is no file that longnet predict wrote, or is damaged"):
        call(predict, trained / "run", slides, "--output", output)


def test_models_without_classes_say_what_to_use(trained, tmp_path):
    encoder, slides = LongNetEncoder(EncoderConfig(**MODEL)), trained / "new" / "slides"
    save_pretrained(encoder, tmp_path / "encoder")
    save_task(MaskedFeatures(encoder, 0, 0.5), (), tmp_path / "masked")
    run(1, feature_config(trained, tmp_path / "masked_run", "train.steps=1", classify=False))
    options = "--output", tmp_path / "a.csv"
    with pytest.raises(ConfigError, match=r"without a head, .* data\.labels=FILE train\.init=.*longnet embed"):
        call(predict, tmp_path / "encoder", slides, *options)
    with pytest.raises(ConfigError, match="an encoder without a head"):
        call(evaluate, tmp_path / "encoder")
    with pytest.raises(ConfigError, match="of a task without classes"):
        call(predict, tmp_path / "masked", slides, *options)
    with pytest.raises(ConfigError, match=r"learned masked_features.*data\.labels=FILE train\.init="):
        call(predict, tmp_path / "masked_run", slides, *options)
    (tmp_path / "text" / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "text" / "checkpoints" / "step_00000001" / "state.json").write_text("{}")
    (tmp_path / "text" / "config.yaml").write_text("model: {name: tiny}\ntrain: {output_dir: text, steps: 1}\n")
    with pytest.raises(ConfigError, match=r"is a run on text, which has no features; give one with data\.features"):
        call(predict, tmp_path / "text", slides, *options)
    with pytest.raises(ConfigError, match=r"no features of its own.* --data FOLDER --labels FILE"):
        call(evaluate, trained / "exported")
    with pytest.raises(ConfigError, match="need labels; give --labels FILE, or classify them with longnet predict"):
        call(evaluate, trained / "run", "--data", slides)


def test_damaged_classifiers_are_refused(trained, tmp_path):
    encoder, slides = LongNetEncoder(EncoderConfig(**MODEL)), trained / "new" / "slides"
    for number, (change, message) in enumerate(
        (
            (lambda folder: (folder / "classes.json").write_text("3"), "must be a JSON list of two names or more"),
            (lambda folder: (folder / "classes.json").write_text("no"), "cannot read"),
            (lambda folder: (folder / "classes.json").write_text('["a", "b", "c"]'), "3 classes in classes.json"),
            (lambda folder: save_file({"weight": torch.zeros(2, 32)}, folder / "head.safetensors"), "export the clas"),
            (lambda folder: (folder / "head.safetensors").write_text("no"), "cannot read"),
            (lambda folder: (folder / "head.safetensors").unlink(), "is no exported classifier"),
        )
    ):
        folder = tmp_path / str(number)
        save_task(Classification(encoder, 2, 0), ("even", "odd"), folder)
        change(folder)
        with pytest.raises(CheckpointError, match=message):
            call(predict, folder, slides, "--output", tmp_path / "a.csv")
        assert not (tmp_path / "a.csv").exists()
