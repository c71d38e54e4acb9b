"""Train a model: [torchrun --nproc_per_node=P] launch/train.py [CONFIG.yaml] [key=value ...]."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from longnet_dist.cli.exit_status import run_cli
from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.config.loading import load_config
from longnet_dist.errors import REQUEUE_STATUS
from longnet_dist.train.loop import run_training

QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
EXAMPLES = """\
examples:
  python launch/train.py                                            the quick start in one process
  torchrun --nproc_per_node=2 launch/train.py                       the same, every sequence split over two ranks
  torchrun --nproc_per_node=8 launch/train.py configs/paper.yaml parallel.sequence=4 deepspeed.zero_stage=2

On SIGTERM or SIGUSR1 the ranks finish their step, write a checkpoint and exit with status 75; the same command goes on.
A mistake or a fault that a person must look at ends with one message and status 2; a rank that another one's death or
silence ends exits with status 69, and the same command goes on.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says; every rank runs this.

    Args:
        arguments: the command line without the program's name, by default that of the process.
    """
    options = _parser().parse_args(arguments)
    words = options.words + ["train.resume=auto"] * options.resume
    path = Path(words.pop(0)) if words and "=" not in words[0] else QUICKSTART
    if not run_training(load_config(path, words), LaunchEnvironment.read(os.environ)):
        raise SystemExit(REQUEUE_STATUS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a LongNet on all ranks that torchrun starts, or in one process.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml | key=value",
        help="a configuration (by default configs/quickstart.yaml), then settings that replace its own",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint: train.resume=auto, the default"
    )
    return parser


if __name__ == "__main__":
    run_cli(main)
