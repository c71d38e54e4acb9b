"""Each optimizer trains as in plain torch, on any stage, and resumes in every bit."""

import filecmp

import pytest
import torch
from safetensors.torch import load_file

from longnet_dist.checkpoint.format import newest_checkpoint, read_state, tensor_files
from longnet_dist.errors import CheckpointError
from longnet_dist.train.setup import RunSetup
from tests.train.runs import run, tiny_config
from tests.train.test_loop import plain_torch

ADAFACTOR = ("train.optimizer=adafactor", "deepspeed.zero_stage=0")
MUON = ("train.optimizer=muon", "train.muon_momentum=0.9", "train.adam_eps=1e-4")


CASES = [
    (1, ADAFACTOR),
    (2, ADAFACTOR),
    (1, (*MUON, "deepspeed.zero_stage=0")),
    (2, (*MUON, "deepspeed.zero_stage=1")),
    (3, (*MUON, "deepspeed.zero_stage=2")),
    (3, (*MUON, "deepspeed.zero_stage=3")),
]


@pytest.mark.parametrize(("ranks", "optimizer"), CASES, ids=lambda value: str(value))
def test_a_run_is_plain_training_and_resumes_in_every_bit(tmp_path, corpus, ranks, optimizer):
    every = ("train.checkpoint_every=2", "train.keep_last=0")
    settings = ("train.adam_eps=1e-8",) if optimizer == ADAFACTOR else ()
    config = tiny_config(tmp_path / "whole", corpus, "train.clip_norm=1", *every, *optimizer, *settings)
    metrics = run(ranks, config)
    curve, weights = plain_torch(config)
    for line, (loss, norm) in zip(metrics, curve, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-4)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)
    whole = newest_checkpoint(config.train.output_dir)
    for name, weight in load_file(whole / "model.safetensors").items():
        # Muon's iteration in bfloat16 makes last bits of a gradient to thousandths of an update.
        assert torch.dist(weight, weights[name]) < 5e-3 * weights[name].norm(), name
    middle = tmp_path / "whole" / "checkpoints" / "step_00000002"
    resumed = tiny_config(
        tmp_path / "resumed", corpus, "train.clip_norm=1", *every, *optimizer, *settings, f"train.resume={middle}"
    )
    run(ranks, resumed)
    other = newest_checkpoint(resumed.train.output_dir)
    assert read_state(other).step == read_state(whole).step == config.train.steps
    for name in tensor_files(config.train.optimizer):
        assert filecmp.cmp(whole / name, other / name, shallow=False), name
    assert any(tensor.abs().sum() > 0 for tensor in load_file(whole / name).values())


def test_bf16_trains_matrices_by_muon_on_sharded_master_weights(tmp_path, corpus):
    exact = run(2, tiny_config(tmp_path / "fp32", corpus, *MUON, "train.steps=3"))
    for stage in (1, 2, 3):
        settings = (*MUON, "train.precision=bf16", f"deepspeed.zero_stage={stage}", "train.steps=3")
        rounded = run(2, tiny_config(tmp_path / f"stage{stage}", corpus, *settings))
        for line, expected in zip(rounded, exact, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-2)


def test_another_optimizer_does_not_go_on_from_a_checkpoint(tmp_path, corpus):
    run(1, tiny_config(tmp_path / "run", corpus, *MUON, "train.steps=1"))
    config = tiny_config(tmp_path / "run", corpus, "train.steps=2")
    with pytest.raises(CheckpointError, match=r"of train\.optimizer=muon, .* adamw .*use train\.optimizer=muon"):
        RunSetup.make(config, 1, "cpu")
