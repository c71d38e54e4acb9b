"""``longnet quickstart``: the packaged example, trained in the current folder."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from longnet_dist.cli.program.parser import CommandParser
from longnet_dist.cli.program.processes import Processes

SUMMARY = "train a small model of Python source here, in a few minutes on two CPU cores"
CONFIG = "quickstart"
CPU_PROCESSES = 2
EXAMPLES = """\
examples:
  longnet quickstart
  longnet quickstart train.steps=1000 train.output_dir=runs/longer
  longnet quickstart --processes 1

The text is the source of this Python's standard library, so nothing is downloaded. The run comes into runs/quickstart
and the text into data/, both in the current folder. The same command goes on with a run that was interrupted.
"""


def main(arguments: Sequence[str]) -> None:
    """Train the quick start as the command line says.

    Args:
        arguments: the words behind ``longnet quickstart``.

    Raises:
        LongNetError: a mistake in the command line, or what ends any training.
    """
    options = parser().parse_intermixed_args(arguments)

    from longnet_dist.cli.train import train

    processes = Processes(["quickstart", *arguments], options.processes, CPU_PROCESSES)
    train(CONFIG, options.settings, processes, lambda config: print(next_steps(config.train.output_dir)))


def next_steps(folder: Path) -> str:
    """Return what to look at in a finished run, and commands to go on with.

    Args:
        folder: of the run.
    """
    from longnet_dist.checkpoint.run_folder import RunFolder

    run = RunFolder(folder)
    config = run.config()
    where, length = shlex.quote(str(folder)), config.data.sequence_length
    data = config.data.path
    shown = data.relative_to(Path.cwd()) if data and data.is_relative_to(Path.cwd()) else data
    looks = [
        f"  {run.curve_file}   loss and validation, as a picture",
        f"  {run.sample_file}   what the trained model writes",
        f"  {run.metrics_file}   every step: loss, gradient norm, tokens/s",
    ]
    commands = [
        f"  longnet evaluate {where} --data {shlex.quote(str(shown))} --context {length // 4} {length}",
        f"  longnet generate {where} --prompt 'def '",
        f"  longnet export {where} {shlex.quote(str(folder) + '-exported')}",
        "  longnet prepare FILES --output my.tokens   then: longnet train quickstart data.path=my.tokens "
        "train.output_dir=runs/mine",
    ]
    return "\n".join(["", "look at", *looks, "", "next", *commands])


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``longnet quickstart``."""
    result = CommandParser("quickstart", "Train a small language model of Python source.", EXAMPLES)
    result.add_argument("settings", nargs="*", metavar="key=value", help="settings, as for longnet train")
    result.add_processes(CPU_PROCESSES)
    return result
