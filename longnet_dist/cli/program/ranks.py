"""The ranks of a command: those that a launcher has started, or those that the command starts itself."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from longnet_dist.cli.program.processes import Processes, python_options
from longnet_dist.comm.agreement import agreed
from longnet_dist.comm.launch_env import LaunchEnvironment, launcher_of, meeting_store
from longnet_dist.errors import ConfigError
from longnet_dist.machine import usable_cores
from longnet_dist.resilience.stop_signals import heeded_signals

KILLED = 128  # plus the number of the signal, as shells count
PROC = Path("/proc")
MEETING_SECONDS = 120.0  # in which a rank with a mistake tells the others, which may take long to import torch
INTERRUPTS_OF_RANKS = 2  # the first asks a rank to stop, the second ends it

_interrupts: list[int] = []  # that came to this process while it waits for ranks


def run_on_ranks(
    processes: Processes,
    work: Callable[[LaunchEnvironment], None],
    check: Callable[[int], object] = lambda num_ranks: None,
) -> None:
    """Do ``work`` on this rank of a launcher; if there is no launcher, start the ranks and wait for them.

    Where only one rank is wanted this process is that rank.

    Args:
        processes: the ranks to start.
        work: what a rank does.
        check: refuses what cannot run on so many ranks, before they start, so that its message comes once.

    Raises:
        ConfigError: a number of ranks was asked for in a rank of a launcher, or is more than there are GPUs.
        SystemExit: with the ranks' exit status, after these were started here.
    """
    if launcher := launcher_of(os.environ) or not processes.starts:
        launch = LaunchEnvironment.read(os.environ)
        if processes.asked not in (None, launch.world_size):
            raise ConfigError(
                f"--processes={processes.asked} would start ranks, but {launcher} has started {launch.world_size}; "
                "leave --processes out"
            )
        return work(launch)
    num_ranks = num_ranks_of(processes)
    if num_ranks == 1:
        return work(LaunchEnvironment())
    check(num_ranks)
    raise SystemExit(start_ranks(processes.command, num_ranks))


def refuse_on_all_ranks(error: Exception) -> NoReturn:
    """Raise an error that this rank had before it met the others, and let the others end with it too.

    A launcher such as srun would leave them waiting for this rank until their time-out.

    Args:
        error: the mistake, such as a file that this host alone does not have.

    Raises:
        LongNetError: this error, or where only some ranks have it, the one that all ranks end with.
    """

    def fail() -> None:
        raise error

    try:
        launch = LaunchEnvironment.read(os.environ)
        store = meeting_store(launch, timedelta(seconds=MEETING_SECONDS))
    except ConfigError:
        raise error from None
    agreed(store, launch, "start", fail, lambda _: {})
    raise error  # which agreed has raised already


def num_ranks_of(processes: Processes) -> int:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if processes.asked and 0 < num_gpus < processes.asked:
        raise ConfigError(
            f"every rank needs a GPU of its own, but --processes={processes.asked} and there are {num_gpus}; use at "
            f"most {num_gpus}, or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
        )
    return processes.asked or (num_gpus if processes.each_gpu else min(num_gpus, 1)) or processes.on_cpus


def start_ranks(command: Sequence[str], num_ranks: int) -> int:
    """Run ``longnet`` with these words on ranks of this machine, by torch's launcher, and wait for them.

    Requests to stop are handed on to the ranks, which write a checkpoint; so their status comes through.

    Returns:
        The exit status of the first rank that failed, or 0.
    """
    from torch.distributed.run import parse_args

    options = parse_args(  # type: ignore[no-untyped-call]
        [
            f"--nproc-per-node={num_ranks}",
            "--max-restarts=0",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0",
            "--local-addr=127.0.0.1",
            "--no-python",
            sys.executable,
            *python_options(),
            "-m",
            "longnet_dist",
            *command,
        ]
    )
    options.signals_to_handle = "SIGQUIT"
    # Else torch's launcher takes 1 and says so in a banner.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // num_ranks)))
    for number in heeded_signals():
        signal.signal(number, _hand_on)
    return exit_status(options)


def exit_status(options: Any) -> int:
    """Run torch's launcher, and return the exit status of the first rank that failed where the launcher says 1.

    Args:
        options: of torchrun, from ``torch.distributed.run.parse_args``.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import run

    _quiet_launcher()
    try:
        run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        killed = failure.exitcode < 0
        how = f"killed by signal {-failure.exitcode}" if killed else f"with status {failure.exitcode}"
        print(f"rank {rank} was the first to end, {how}", file=sys.stderr)
        return KILLED - failure.exitcode if killed else failure.exitcode
    except SignalException as error:
        return KILLED + int(error.sigval)
    return 0


def _quiet_launcher() -> None:
    """Let torch's launcher log nothing about ranks that end: it says less than their own message and status."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _hand_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to the ranks, which torch's launcher keeps in sessions of their own.

    At the third Ctrl-C the launcher ends, and kills ranks that do not react.
    """
    _interrupts.extend([number] * (number == signal.SIGINT))
    if len(_interrupts) > INTERRUPTS_OF_RANKS:
        signal.default_int_handler(number, frame)
    for process in _children():
        with suppress(ProcessLookupError):
            os.kill(process, number)


def _children() -> list[int]:
    """The processes that this one started: from /proc where there is one, else from ``ps``."""
    parents: dict[int, int] = {}
    if (PROC / "self" / "stat").exists():
        for stat in PROC.glob("[0-9]*/stat"):
            with suppress(OSError):
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    elif shutil.which("ps"):
        answer = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
        parents = {int(words[0]): int(words[1]) for words in map(str.split, answer.splitlines()) if len(words) == 2}
    return [process for process, parent in parents.items() if parent == os.getpid()]
