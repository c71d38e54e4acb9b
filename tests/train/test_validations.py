"""The best checkpoint, and a run that ends early."""

import math

import pytest

from longnet_dist.checkpoint.format import Progress, checkpoint_folder, checkpoints, parse_state, tensor_files
from longnet_dist.checkpoint.writer import delete_old, write_checkpoint
from longnet_dist.config.model import LongNetConfig
from longnet_dist.telemetry.json_lines import read_jsonl
from longnet_dist.train.setup import RunSetup
from longnet_dist.train.validations import Validations
from tests.train.runs import run, tiny_config

MODEL = LongNetConfig(name="tiny")


@pytest.mark.parametrize(
    ("losses", "best", "since"),
    [
        ([], None, 0),
        ([3.0, 2.0, 1.0], 1.0, 0),
        ([2.0, 3.0, 2.0], 2.0, 2),
        ([math.nan, 2.0, math.nan], 2.0, 1),
        ([math.nan, math.inf], None, 2),
    ],
)
def test_validations_count_from_the_best(losses, best, since):
    validations = Validations()
    for number, loss in enumerate(losses, 1):
        validations.add(10 * number, loss)
    assert (validations.best, validations.since_best) == (best, since)
    assert validations.is_exhausted(2) == (since >= 2)
    assert not validations.is_exhausted(0)
    assert validations.is_best(10 * len(losses)) == (since == 0 and best is not None)
    assert validations.loss_after(5) is None


@pytest.mark.parametrize(
    ("losses", "left"),
    [
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: None}, [2, 4]),
        ({1: None, 2: None, 3: None}, [3]),
        ({1: 1.0, 2: 0.5, 3: 0.25}, [3]),
    ],
)
def test_the_best_checkpoint_is_kept(tmp_path, losses, left):
    for step, loss in losses.items():
        progress = Progress(step=step, tokens=step, validation_loss=loss)
        write_checkpoint(checkpoint_folder(tmp_path, step), {name: {} for name in tensor_files()}, MODEL, progress)
    assert delete_old(tmp_path, 1, keep_best=True) == []
    assert [int(folder.name[-1]) for folder in checkpoints(tmp_path)] == left


def test_a_run_ends_early_and_keeps_its_best(tmp_path, corpus, capfd):
    """A learning rate with which the loss falls once and then rises."""
    settings = ("train.validate_every=1", "train.validation_tokens=256", "train.steps=30", "train.learning_rate=0.3")
    settings = (*settings, "train.warmup_steps=0", "train.patience=2", "train.keep_best=true", "train.keep_last=1")
    config = tiny_config(tmp_path / "run", corpus, *settings)
    lines = run(1, config)
    losses = [line["loss"] for line in read_jsonl(tmp_path / "run" / "validation.jsonl")]
    best = losses.index(min(losses))
    assert len(lines) == len(losses) == best + 3 < 30
    assert f"ended early after step {len(lines)} of 30: 2 validations" in capfd.readouterr().out
    assert [int(folder.name[-2:]) for folder in checkpoints(tmp_path / "run")] == [best + 1, best + 3]
    assert parse_state(checkpoints(tmp_path / "run")[0]).validation_loss == losses[best]
    assert RunSetup.make(config, 1, "cpu").is_complete
    patient = [word.replace("patience=2", "patience=3") for word in settings]
    assert not RunSetup.make(tiny_config(tmp_path / "run", corpus, *patient), 1, "cpu").is_complete
