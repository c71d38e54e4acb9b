"""Train in processes that are forked from a server without threads, which has imported everything."""

from __future__ import annotations

import multiprocessing

from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.experiments.plan import Run

SECONDS = 120


def train(run: Run) -> None:
    """Train a run in a process of its own: DeepSpeed trains one model in a process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.docs.preloaded"])
    process = context.Process(target=_train, args=(run,))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0, f"the training of {run.key} ended with {process.exitcode}"


def _train(run: Run) -> None:
    from longnet_dist.train.loop import run_training

    run_training(run.config(), LaunchEnvironment())


def never(run: Run) -> None:
    """Refuse to train."""
    raise AssertionError(f"{run.key} is trained again")
