"""``longnet train``: a training run, on ranks that it starts or joins."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longnet_dist.cli.program.parser import CommandParser
from longnet_dist.cli.program.processes import LAUNCHER_VARIABLES, Processes

if TYPE_CHECKING:
    from longnet_dist.comm.launch_env import LaunchEnvironment
    from longnet_dist.config.schema import Config

SUMMARY = "train a model, on all GPUs of this machine or as a rank of a launcher"
EXAMPLES = """\
CONFIG is a YAML file, - for standard input, or the name of a packaged configuration: {names}.
key=value replaces a key of it: train.steps=500 model.dilation_rates=[1,2,4] data.path=~/book.tokens
Text and paths are taken as they are; other values are YAML.
longnet train --keys lists every key with its default.

examples:
  longnet train paper data.path=corpus.tokens                  a process for each GPU of this machine
  longnet train paper parallel.sequence=4 train.steps=20000    every sequence split over four GPUs
  longnet train my.yaml --processes 2                          two processes, on CPUs too
  longnet train model.path=llama/ model.segment_lengths=[2048,8192] ...   a Hugging Face model
  torchrun --nnodes=2 --nproc_per_node=8 ... -m longnet_dist train paper
  srun --ntasks-per-node=8 longnet train paper
  mpirun -n 16 longnet train paper

Under torchrun, srun, mpirun or deepspeed the process joins the ranks that these have started.
On SIGTERM, SIGUSR1, SIGHUP or Ctrl-C the ranks finish their step, write a checkpoint and exit with status 75; the same
command goes on. A second Ctrl-C ends them at once.
A mistake or a fault that a person must look at ends with one message and status 2; a rank that another one's death or
silence ends exits with status 69, and the same command goes on.
"""


def main(arguments: Sequence[str], as_rank: bool = False) -> None:
    """Train as the command line says.

    Args:
        arguments: the words behind ``longnet train``.
        as_rank: this process is a rank, whether a launcher started it or nobody did, so it starts none; and without a
            configuration it trains the quick start. So does ``launch/train.py``.

    Raises:
        LongNetError: a mistake in the command line, the configuration, the data or a checkpoint.
    """
    from longnet_dist.config.packaged import run_names
    from longnet_dist.errors import ConfigError

    options = parser().parse_intermixed_args(arguments)
    if options.keys:
        from longnet_dist.config.keys import key_lines

        print("\n".join(key_lines()))
        return
    words = options.words + ["train.resume=auto"] * options.resume
    if words and ("=" not in words[0] or Path(words[0]).is_file()):
        config = words.pop(0)
    elif any(word.startswith("model.path=") for word in words):
        config = None
    elif as_rank:
        config = "quickstart"
    else:
        raise ConfigError(
            "a configuration must come first: longnet train CONFIG [key=value ...], where CONFIG is a YAML file or "
            f"one of {', '.join(run_names())}; with model.path=FOLDER it may be left out"
        )
    from longnet_dist.config.packaged import read_once

    with read_once(config) as file:
        command = [file if file and word == config else word for word in arguments]
        processes = Processes(["train", *command], options.processes, starts=not as_rank)
        train(file, words, processes, verify=options.verify)


def train(
    config_word: str | None,
    overrides: Sequence[str],
    processes: Processes,
    conclude: Callable[[Config], None] = lambda config: None,
    verify: bool = False,
) -> None:
    """Train on the ranks of a launcher, or on those that are started here.

    Args:
        config_word: a YAML file or the name of a packaged configuration; None: the words say all.
        overrides: ``key=value`` words.
        processes: how ranks are started.
        conclude: is called on rank 0 when training is done.
        verify: compare the checksums of the token file before the first step, on one rank of each machine.

    Raises:
        LongNetError: a package of the extra ``train`` is absent; a mistake in the configuration, the data or a
            checkpoint.
        SystemExit: with status 75 after a request to stop, or with that of the ranks that were started here.
    """
    from longnet_dist.config.loading import load_config
    from longnet_dist.config.packaged import find_config
    from longnet_dist.errors import REQUEUE_STATUS, LongNetError
    from longnet_dist.extras import require_extra

    try:
        require_extra("train", "training")
        file = None if config_word is None else find_config(config_word)
        config = load_config(file, overrides)
    except LongNetError as error:
        if os.environ.keys().isdisjoint(LAUNCHER_VARIABLES):
            raise  # a mistake of a single process needs no torch to be told
        from longnet_dist.cli.program.ranks import refuse_on_all_ranks

        refuse_on_all_ranks(error)

    from longnet_dist.cli.program.ranks import run_on_ranks

    def work(launch: LaunchEnvironment) -> None:
        from longnet_dist.train.loop import run_training

        if not run_training(config, launch, verify):
            raise SystemExit(REQUEUE_STATUS)
        if launch.rank == 0:
            conclude(config)

    def check(num_ranks: int) -> None:
        import torch

        from longnet_dist.train.setup import RunSetup

        RunSetup.make(config, num_ranks, "cuda" if torch.cuda.is_available() else "cpu")

    run_on_ranks(processes, work, check)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``longnet train``."""
    from longnet_dist.config.packaged import run_names

    result = CommandParser("train", "Train a LongNet.", EXAMPLES.format(names=", ".join(run_names())))
    result.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG | key=value",
        help="a configuration, then settings that replace its own",
    )
    result.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint: train.resume=auto, the default"
    )
    result.add_processes()
    result.add_argument(
        "--verify", action="store_true", help="read the whole token file first and compare its checksums"
    )
    result.add_argument("--keys", action="store_true", help="list every key, with its default and what it means")
    return result
