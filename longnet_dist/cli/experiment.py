"""``longnet experiment``: the runs of an experiment, with its table and picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longnet_dist.cli.program.parser import CommandParser
from longnet_dist.cli.program.processes import Processes

if TYPE_CHECKING:
    from longnet_dist.experiments.plan import Run

SUMMARY = "train and measure the runs of an experiment: table, picture and JSON"
EXAMPLES = """\
NAME is one of {names}.
key=value replaces a key of all runs, as for longnet train.

examples:
  longnet experiment distance
  longnet experiment context --data linux.tokens
  longnet experiment context --data linux.tokens --runs full-2k dilated-32k
  longnet experiment variants --smoke

A run that is finished is not run again, and an interrupted one goes on. With --runs, several machines or GPUs
(CUDA_VISIBLE_DEVICES=1 longnet experiment ...) share an experiment through one --output. --smoke is a size that runs on
a CPU within seconds: it shows that everything works, and is no result.
"""


def main(arguments: Sequence[str]) -> None:
    """Run an experiment as the command line says.

    Args:
        arguments: the words behind ``longnet experiment``.

    Raises:
        LongNetError: a mistake in the command line, or what ends any training or evaluation.
        SystemExit: with status 75 after a request to stop.
    """
    options = parser().parse_intermixed_args(arguments)

    import os

    from longnet_dist.cli.program.ranks import num_ranks_of
    from longnet_dist.comm.launch_env import LaunchEnvironment, launcher_of
    from longnet_dist.data.token_file import TokenFile
    from longnet_dist.errors import ConfigError
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
    run_all(runs, lambda run: _train(run, num_ranks), LaunchEnvironment())
    folder = experiment.folder(options.output)
    print((folder / f"{experiment.name}.md").read_text(encoding="utf-8"))
    print(f"picture: {folder / f'{experiment.name}.png'}")


def _train(run: Run, num_ranks: int) -> None:
    """Train a run to its end on ranks of its own; DeepSpeed trains one model in a process."""
    import yaml

    from longnet_dist.checkpoint.run_folder import write_text
    from longnet_dist.cli.program.ranks import start_ranks

    file = run.folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, yaml.safe_dump(run.config().model_dump(mode="json"), sort_keys=False))
    if status := start_ranks(["train", str(file)], num_ranks):
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
    result.add_argument("--smoke", action="store_true", help="the size for trials on a CPU")
    result.add_processes()
    return result
