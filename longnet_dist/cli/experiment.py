"""``longnet experiment``: the runs of an experiment, with its table and picture."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longnet_dist.cli.program.parser import CommandParser, above_zero
from longnet_dist.cli.program.processes import Processes

if TYPE_CHECKING:
    from longnet_dist.experiments.plan import Run

SUMMARY = "train and measure the runs of an experiment: table, picture and JSON"
START_SECONDS = 15  # what is not begun by then is left for the next call
EXAMPLES = """\
NAME is one of {names}.
key=value replaces a key of all runs, as for longnet train.

examples:
  longnet experiment distance
  longnet experiment context --data linux.tokens
  longnet experiment context --data linux.tokens --runs full-2k dilated-32k
  longnet experiment variants --smoke

A run that is finished is not run again, and an interrupted one goes on. With --runs, several machines or GPUs
(CUDA_VISIBLE_DEVICES=1 longnet experiment ...) share an experiment through one --output. --minutes ends in time with a
checkpoint and status 75; the same command goes on. --smoke is a size that runs on
a CPU within seconds: it shows that everything works, and is no result.
"""


def main(arguments: Sequence[str]) -> None:
    """Run an experiment as the command line says.

    Args:
        arguments: the words behind ``longnet experiment``.

    Raises:
        LongNetError: a mistake in the command line, or what ends any training or evaluation.
        SystemExit: with status 75 after a request to stop, or when the time is over.
    """
    options = parser().parse_intermixed_args(arguments)

    import os
    import time

    from longnet_dist.cli.program.ranks import num_ranks_of
    from longnet_dist.comm.launch_env import LaunchEnvironment, launcher_of
    from longnet_dist.data.token_file import TokenFile
    from longnet_dist.errors import REQUEUE_STATUS, ConfigError
    from longnet_dist.experiments.plan import Experiment, runs_of
    from longnet_dist.experiments.runner import run_all
    from longnet_dist.extras import require_extra

    experiment = Experiment.read(options.name, options.smoke)
    require_extra("train", "an experiment")
    if launcher := launcher_of(os.environ):
        raise ConfigError(
            f"longnet experiment starts the ranks of its runs, but {launcher} has started it; run it without a "
            f"launcher, with --processes"
        )
    vocab_size = TokenFile.open(options.data).tokenizer.vocab_size if options.data else None
    given = {"overrides": options.settings, "data": options.data, "vocab_size": vocab_size}
    runs = list(runs_of(experiment, options.runs, options.output, **given))

    num_ranks = num_ranks_of(Processes([], options.processes, each_gpu=False))
    end = time.monotonic() + 60 * (options.minutes or math.inf)
    try:
        finished = run_all(
            runs,
            lambda run: _train(run, num_ranks, end - time.monotonic()),
            LaunchEnvironment(),
            lambda: time.monotonic() > end - START_SECONDS,
        )
    finally:
        page, picture = (experiment.folder(options.output) / f"{experiment.name}.{suffix}" for suffix in ("md", "png"))
        if page.exists():
            print(page.read_text(encoding="utf-8"))
            print(f"picture: {picture}")
    if not finished:
        print(f"the {options.minutes} minutes are over; the same command goes on")
        raise SystemExit(REQUEUE_STATUS)


def _train(run: Run, num_ranks: int, seconds: float) -> None:
    """Train a run to its end on ranks of its own; DeepSpeed trains one model in a process.

    Args:
        run: which.
        num_ranks: of the run.
        seconds: after which the ranks are asked to stop.
    """
    import os
    import signal
    import threading

    import yaml

    from longnet_dist.checkpoint.run_folder import write_text
    from longnet_dist.cli.program.ranks import start_ranks

    file = run.folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, yaml.safe_dump(run.config().model_dump(mode="json"), sort_keys=False))
    # The handler of start_ranks hands the signal on to the ranks, which leave a checkpoint.
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        status = start_ranks(["train", str(file)], num_ranks)
    finally:
        timer.cancel()
    if status:
        raise SystemExit(status)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``longnet experiment``."""
    from longnet_dist.experiments import experiment_names

    names = ", ".join(experiment_names())
    result = CommandParser("experiment", "Train and measure the runs of an experiment.", EXAMPLES.format(names=names))
    result.add_argument("name", metavar="NAME", help=f"one of {names}")
    result.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace those of all runs")
    result.add_argument("--data", type=Path, metavar="TOKEN_FILE", help="text (default: Python's standard library)")
    result.add_argument(
        "--output", type=Path, default=Path("experiments"), metavar="DIR", help="folder (default %(default)s)"
    )
    result.add_argument("--runs", nargs="+", default=[], metavar="RUN", help="only these runs (default: all)")
    result.add_argument(
        "--minutes", type=above_zero, metavar="M", help="end after so long with a checkpoint; the same command goes on"
    )
    result.add_argument("--smoke", action="store_true", help="the size for trials on a CPU")
    result.add_processes()
    return result
