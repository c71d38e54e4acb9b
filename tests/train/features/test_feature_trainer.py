"""Encoders learn tasks on features, alike on any number of ranks; resuming changes no bit."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from longnet_dist.checkpoint.format import newest_checkpoint
from longnet_dist.errors import DataError
from tests.distributed import run_distributed
from tests.train.features.slides import feature_config, run, write_slides
from tests.train.runs import import_deepspeed, make_trainer


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    import_deepspeed()
    return write_slides(tmp_path_factory.mktemp("features"))


def losses(lines):
    return [line["loss"] for line in lines]


@pytest.mark.parametrize("classify", [True, False], ids=["classification", "masked_features"])
def test_losses_do_not_depend_on_ranks(slides, tmp_path, classify):
    found = []
    layouts = (1, ()), (2, ("parallel.sequence=2",)), (2, ("parallel.data=2", "deepspeed.zero_stage=3"))
    for number, (ranks, settings) in enumerate((*layouts, (1, ("train.micro_batch_size=1",)))):
        config = feature_config(slides, tmp_path / str(number), *settings, classify=classify)
        found.append(run(ranks, config))
    metrics, validations = found[0]
    assert len(metrics) == 4
    assert len(validations) == 2
    assert validations[0].keys() >= ({"accuracy", "auc"} if classify else set())
    for others, other_validations in found[1:]:
        for key in ("loss", "grad_norm", "tokens"):
            np.testing.assert_allclose([x[key] for x in others], [x[key] for x in metrics], rtol=1e-5)
        np.testing.assert_allclose(losses(other_validations), losses(validations), rtol=1e-5)


@pytest.mark.parametrize("classify", [True, False], ids=["classification", "masked_features"])
def test_resuming_changes_no_bit(slides, tmp_path, classify):
    """Dropout and stochastic depth included, and with recomputed blocks."""
    settings = ("model.dropout=0.1", "model.drop_path=0.2", "train.activation_checkpointing=full")
    whole = feature_config(slides, tmp_path / "whole", *settings, classify=classify)
    undisturbed = run(1, whole)
    # The learning rate decays over all steps, so the run is stopped, not shortened.
    parts = feature_config(slides, tmp_path / "parts", *settings, "train.checkpoint_every=2", classify=classify)
    import_deepspeed()
    run_distributed(stopped_after_two_steps, 1, parts)
    assert newest_checkpoint(tmp_path / "parts").name == "step_00000002"
    resumed = run(1, parts)
    assert losses(resumed[0]) == losses(undisturbed[0])
    for name in ("model", "exp_avg", "exp_avg_sq"):
        one, other = (
            load_file(newest_checkpoint(tmp_path / run) / f"{name}.safetensors") for run in ("whole", "parts")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def stopped_after_two_steps(config):
    trainer = make_trainer(config)
    original = trainer._train_step

    def stopped(step, rate, stop_requested, *rest):
        return original(step, rate, lambda: step == 1, *rest)

    trainer._train_step = stopped
    assert not trainer.run()


def test_it_learns_to_classify_and_writes_what_it_found(slides, tmp_path, capfd):
    config = feature_config(slides, tmp_path / "run", "train.steps=30", "train.validate_every=30")
    metrics, validations = run(1, config)
    assert metrics[-1]["loss"] < metrics[0]["loss"] / 5
    assert validations[-1]["accuracy"] == validations[-1]["auc"] == 1.0
    shown = capfd.readouterr().out
    assert "features: 8 files for training and 2 for validation, 6 to 36 rows; classes: even, odd" in shown
    assert "accuracy 1.0000, auc 1.0000 after 30 steps" in shown
    assert (tmp_path / "run" / "classes.json").read_text() == '["even", "odd"]'
    assert (tmp_path / "run" / "loss.png").stat().st_size > 0


def test_hidden_features_are_predicted_better(slides, tmp_path):
    settings = ("train.steps=40", "train.validate_every=20", "train.learning_rate=3e-3")
    metrics, validations = run(1, feature_config(slides, tmp_path / "run", *settings, classify=False))
    assert np.mean(losses(metrics[-5:])) < 0.7 * np.mean(losses(metrics[:5]))
    assert losses(validations)[-1] < 0.5  # the channel that tells the class is 1 or -1 everywhere


def read_faults(config):
    trainer = make_trainer(config)
    try:
        trainer.run()
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize("ranks", [1, 2])
def test_numbers_that_are_not_finite_end_all_ranks_with_one_message(tmp_path, ranks):
    folder = write_slides(tmp_path, 4)
    contents = torch.load(folder / "slides" / "s2.pt", weights_only=True)
    contents["features"][-1, 3] = float("nan")
    torch.save(contents, folder / "slides" / "s2.pt")
    import_deepspeed()
    config = feature_config(folder, tmp_path / "run", "data.validation_share=0", "train.validate_every=0")
    messages = run_distributed(read_faults, ranks, config)
    assert len(set(messages)) == 1
    assert "s2.pt has features that are not finite in 1 rows, the first is row 15" in messages[0]
