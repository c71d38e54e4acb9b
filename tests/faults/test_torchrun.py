"""What torchrun's own signals do to a run."""

import signal

import pytest

from longnet_dist.checkpoint.format import checkpoints, read_state
from tests.faults.kill_test import start, wait, workers
from tests.faults.ranks import num_steps
from tests.train.runs import write_config


@pytest.mark.parametrize("number", [signal.SIGINT], ids=["Ctrl-C"])
def test_a_signal_to_torchrun_leaves_a_checkpoint_and_status_1(corpus, tmp_path, number):
    config, run = write_config(tmp_path, "run", corpus), tmp_path / "run"
    with open(tmp_path / "log", "w") as log:
        job = start(config, ["train.steps=100000"], 0, log)
        try:
            wait(job, lambda: num_steps(run) >= 3)
            ranks = workers(job.pid)
            job.send_signal(number)
            assert job.wait(200) == 1
        finally:
            job.kill()
    text = (tmp_path / "log").read_text()
    (checkpoint,) = checkpoints(run)
    assert read_state(checkpoint).step == num_steps(run)
    assert f"asked to stop: step {num_steps(run)} of 100000 is in {checkpoint}" in text
    assert len(ranks) == 2
    assert not workers_left(ranks)
    assert not list((run / "checkpoints").glob(".*"))


def workers_left(ranks):
    from longnet_dist.machine import process_start

    return [pid for pid in ranks if process_start(pid) is not None]
