"""Real processes that train together, to be stopped and killed: each is forked, so that all imports are done."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from launch import train
from longnet_dist.cli import run_cli
from tests.train.runs import import_deepspeed

DEADLINE_SECONDS = 120.0


class Ranks:
    """``launch/train.py`` with these arguments on some ranks of this machine.

    ``status`` has the exit status of each rank after ``wait``, negative for a signal; ``output(rank)`` what it wrote.
    """

    def __init__(self, folder, world_size, *arguments):
        import_deepspeed()
        self.folder, self.status = Path(folder), {}
        self.folder.mkdir(exist_ok=True)
        port = _free_port()
        self.pids = [self._fork(rank, world_size, port, list(map(str, arguments))) for rank in range(world_size)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank, pid in enumerate(self.pids):
            if rank not in self.status:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _fork(self, rank, world_size, port, arguments):
        if pid := os.fork():
            return pid
        try:
            torch.set_num_threads(1)
            output = os.open(self.folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            values = (rank, rank, world_size, world_size, "127.0.0.1", port)
            os.environ.update(zip(names, map(str, values), strict=True))
            run_cli(lambda: train.main(arguments))
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)

    def send(self, rank, number):
        os.kill(self.pids[rank], number)

    def wait(self, ranks=None):
        """The exit status of each of these ranks, all if not given."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        for rank in range(len(self.pids)) if ranks is None else ranks:
            while rank not in self.status:
                pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                if pid:
                    self.status[rank] = os.waitstatus_to_exitcode(status)
                assert time.monotonic() < deadline, f"rank {rank} goes on: {self.output(rank)}"
                time.sleep(0.01)
        return [self.status[rank] for rank in sorted(self.status)]

    def output(self, rank):
        return (self.folder / f"rank{rank}.log").read_text()

    def errors(self, rank):
        return [line for line in self.output(rank).splitlines() if line.startswith("error: ")]


def wait_for_step(run, step):
    """Wait until a run has done a step."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        file = run / "metrics.jsonl"
        if file.exists() and len(file.read_text().splitlines()) >= step:
            return
        assert time.monotonic() < deadline, f"{run} does not get to step {step}"
        time.sleep(0.01)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
