"""Kills leave no trace: the short form of ``kill_test.py``, which has many more, through torchrun."""

import random
import signal

from tests.faults.ranks import Ranks, checkpoint_is_torn, freeze_in_checkpoint, num_steps, same_bits, wait_for_step
from tests.train.runs import write_config

SETTINGS = ("train.steps=50", "train.checkpoint_every=2")


def kill_some_time(ranks, run, rng):
    wait_for_step(run, num_steps(run) + rng.randrange(2, 8))
    killed = rng.randrange(2)
    ranks.send(killed, signal.SIGKILL)
    return killed


def kill_in_checkpoint(ranks, run, rng):
    wait_for_step(run, num_steps(run) + rng.randrange(2, 8))
    freeze_in_checkpoint(ranks.pids[0], run, rng)
    ranks.send(0, signal.SIGKILL)
    return 0


def test_killed_and_started_again_a_run_is_the_undisturbed_one(corpus, tmp_path):
    rng, run, config = random.Random(0), tmp_path / "killed", write_config(tmp_path, "killed", corpus)
    for kill in (kill_some_time, kill_in_checkpoint, kill_in_checkpoint):
        with Ranks(tmp_path / "logs", 2, config, *SETTINGS) as ranks:
            killed = kill(ranks, run, rng)
            status = ranks.wait()
            assert (status[killed], status[1 - killed]) == (-9, 69), ranks.output(1 - killed)
            assert checkpoint_is_torn(run) or kill is kill_some_time
    for again in (config, write_config(tmp_path, "whole", corpus)):
        with Ranks(tmp_path / "logs", 2, again, *SETTINGS) as ranks:
            assert ranks.wait() == [0, 0]
    assert same_bits(run, tmp_path / "whole") == "step_00000050"
