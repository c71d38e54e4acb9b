"""Steps that lie far beyond those before."""

import math
import random

import pytest
import torch
from safetensors.torch import load_file

from longnet_dist.checkpoint.format import checkpoint_folder, read_state
from longnet_dist.telemetry.json_lines import read_jsonl
from longnet_dist.train import loop
from longnet_dist.train.spikes import WINDOW, RecentSteps
from tests.distributed import run_distributed
from tests.train.runs import import_deepspeed, make_trainer, tiny_config


def recent(number, sigma=0.1):
    rng = random.Random(0)
    return RecentSteps([[2 + rng.gauss(0, sigma), 1 + rng.gauss(0, sigma)] for _ in range(number)])


@pytest.mark.parametrize(
    ("loss", "norm", "expected"),
    [
        (2.0, 1.0, False),
        (2.5, 1.5, False),
        (2.8, 1.0, True),
        (2.0, 1.8, True),
        (0.0, 0.0, False),  # a fall is no spike
        (math.inf, 1.0, True),
    ],
)
def test_a_spike_is_six_deviations_above(loss, norm, expected):
    assert recent(WINDOW).is_spike(loss, norm) is expected


def test_little_is_known_at_first():
    assert not recent(WINDOW // 2 - 1).is_spike(99, 99)
    assert recent(WINDOW // 2).is_spike(99, 1)
    assert not recent(WINDOW, sigma=0).is_spike(3, 3)


def test_a_lasting_change_is_followed():
    steps, spikes = recent(WINDOW), 0
    for _ in range(WINDOW):
        spikes += steps.is_spike(4.0, 1.0)
        steps.add(4.0, 1.0)
    assert 1 <= spikes <= 5


def test_what_is_not_finite_is_not_remembered():
    steps = recent(3)
    for pair in ((math.nan, 1.0), (1.0, math.inf), (5.0, 6.0)):
        steps.add(*pair)
    assert len(steps.values()) == 4
    assert RecentSteps(steps.values()).values() == steps.values()
    assert steps.values()[-1] == [5.0, 6.0]


def spiked(config, spikes):
    """Train; rank 1 alone calls some steps spikes."""
    asked = []

    class Said(RecentSteps):
        def is_spike(self, loss, grad_norm):
            asked.append((loss, grad_norm))
            return len(asked) in spikes and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "RecentSteps", Said)
        make_trainer(config).run()
    return asked


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_a_spike_changes_nothing_and_is_counted(tmp_path, corpus, stage, precision):
    import_deepspeed()
    settings = ("train.skip_spikes=true", "train.steps=3", "train.checkpoint_every=1", "train.keep_last=0")
    settings = (*settings, f"deepspeed.zero_stage={stage}", f"train.precision={precision}", "train.micro_batch_size=1")
    config = tiny_config(tmp_path / "run", corpus, "train.warmup_steps=0", *settings)
    asked, others = run_distributed(spiked, 2, config, {2})
    assert asked == others
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [(line["skipped"], line["spikes"]) for line in lines] == [(0, 0), (1, 1), (1, 1)]
    assert [(line["loss"], line["grad_norm"]) for line in lines] == [pytest.approx(pair) for pair in asked]
    folders = [checkpoint_folder(tmp_path / "run", step) for step in (1, 2, 3)]
    for name in ("model", "exp_avg", "exp_avg_sq"):
        first, second, third = (load_file(folder / f"{name}.safetensors") for folder in folders)
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert not all(torch.equal(first[key], third[key]) for key in first)
    state = read_state(folders[2])
    assert (state.skipped, state.spikes, len(state.recent)) == (1, 1, 3)
