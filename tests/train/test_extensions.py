"""What one new file registers is trained, planned, written and resumed by its names alone."""

import filecmp

import pytest
import torch
from safetensors.torch import load_file

from longnet_dist.checkpoint.format import newest_checkpoint, tensor_files
from longnet_dist.estimate.devices import named_device
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.run_estimate import Estimate
from longnet_dist.geometry.offset_rules import OFFSET_RULES
from longnet_dist.geometry.position_encodings import POSITION_ENCODINGS
from longnet_dist.optim.optimizers import OPTIMIZERS
from longnet_dist.optim.schedules import SCHEDULES
from tests.registries import temporary_entries
from tests.train.runs import run, tiny_config
from tests.train.test_loop import plain_torch

NAMES = (
    "train.optimizer=sgd",
    "train.schedule=halves",
    "model.positions=half_rope",
    "model.head_offsets=backwards",
    "train.adam_eps=1e-8",
)


@pytest.fixture
def extended():
    """Registers what the new file has, for one test."""
    with temporary_entries(OPTIMIZERS, SCHEDULES, POSITION_ENCODINGS, OFFSET_RULES):
        import tests.train.extensions  # noqa: F401

        yield


@pytest.mark.usefixtures("extended")
def test_four_registrations_train_as_in_plain_torch_and_resume(tmp_path, corpus):
    every = ("train.checkpoint_every=3", "train.keep_last=0", "train.clip_norm=1", "deepspeed.zero_stage=1")
    config = tiny_config(tmp_path / "whole", corpus, *NAMES, *every)
    metrics = run(2, config)
    curve, weights = plain_torch(config)
    assert [line["lr"] for line in metrics] == pytest.approx([0.005, 0.01, 0.01, 0.005])
    for line, (loss, norm) in zip(metrics, curve, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    whole = newest_checkpoint(config.train.output_dir)
    for name, weight in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name].detach(), rtol=1e-4, atol=1e-6)
    middle = config.train.output_dir / "checkpoints" / "step_00000003"
    resumed = tiny_config(tmp_path / "resumed", corpus, *NAMES, *every, f"train.resume={middle}")
    run(2, resumed)
    files = tensor_files("sgd")
    assert files == ("model.safetensors", "momentum_buffer.safetensors")
    other = newest_checkpoint(resumed.train.output_dir)
    assert all(filecmp.cmp(whole / name, other / name, shallow=False) for name in files)
    adamw = tiny_config(tmp_path / "adamw", corpus, *every)
    sizes = [
        Estimate.of(RunLayout.of(each, 2, "cuda"), named_device("h100")).memory.device["optimizer"]
        for each in (config, adamw)
    ]
    assert sizes[0] == pytest.approx(2 / 3 * sizes[1], rel=1e-3)  # master weights and one moment, not two
