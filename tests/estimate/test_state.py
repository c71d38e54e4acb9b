"""The estimated bytes of DeepSpeed's state are those of a real engine."""

import gc

import pytest

from longnet_dist.config import deepspeed
from longnet_dist.estimate import state
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.memory import memory_of
from tests.distributed import run_distributed
from tests.estimate.live_bytes import LiveBytes
from tests.train.runs import make_trainer, tiny_config

MODEL = ("model.dim=384", "model.heads=4", "data.sequence_length=16", "train.batch_size=2")
EPS = ("train.adam_eps=1e-8",)  # the default: the optimizer has none
BUCKET = 100_000  # so that it is not all there is to see; matrices larger than what stage 3 leaves whole


def bytes_of_a_run(config):
    """Return the living bytes after a step, and the peak of the next step."""
    with LiveBytes() as live:
        trainer = make_trainer(config)
        live.add([parameter.data for parameter in trainer.engine.module.parameters()])
        trainer._train_step(0, 1e-3)
        gc.collect()
        live.add([])
        after = live.peak = live.now
        trainer._train_step(1, 1e-3)
        return after, live.peak


@pytest.mark.parametrize(
    ("ranks", "precision", "stage", "optimizer"),
    [
        (1, "fp32", 0, "adamw"),
        (2, "fp32", 1, "adamw"),
        (2, "bf16", 1, "adamw"),
        (2, "bf16", 2, "adamw"),
        (2, "bf16", 3, "adamw"),
        (1, "fp32", 0, "adafactor"),
        (2, "bf16", 1, "muon"),
        (2, "bf16", 3, "muon"),
    ],
)
def test_what_stays_and_the_peak(tmp_path, corpus, monkeypatch, ranks, precision, stage, optimizer):
    for module in (deepspeed, state):
        monkeypatch.setattr(module, "REDUCE_BUCKET_NUMBERS", BUCKET)
    settings = f"train.precision={precision}", f"deepspeed.zero_stage={stage}", f"parallel.data={ranks}"
    settings = (*settings, f"train.optimizer={optimizer}")
    config = tiny_config(tmp_path / "run", corpus, *MODEL, *settings, *EPS * (optimizer == "adafactor"))
    (after, peak), *_ = run_distributed(bytes_of_a_run, ranks, config)
    layout = RunLayout.of(config, ranks, "cpu")
    planned = state.state_of(layout)
    stays = planned.parameters + planned.optimizer + planned.gradients_before
    assert stays == pytest.approx(after, rel=0.02)
    assert memory_of(layout).device_bytes == pytest.approx(peak, rel=0.1)
