"""Real processes that train together, to be stopped and killed."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from longnet_dist.checkpoint.format import ADAMW, WEIGHTS, checkpoints, saved_tensors, state_names
from longnet_dist.cli import train
from longnet_dist.cli.program.exit_status import run_cli

SHOW_STACKS = signal.SIGRTMIN
DEADLINE_SECONDS = 240.0  # of waiting for something that ought to come; nothing is measured by it

# Forked from a process that has imported everything and done nothing. Forked from this one, in which other tests have
# computed with threads, a rank would wait for threads of OpenMP that are not there.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.faults.imported"])


class Ranks:
    """``longnet train`` with these arguments on some ranks of this machine.

    ``status`` has the exit status of each rank after ``wait``, negative for a signal; ``output(rank)`` what it wrote.
    """

    def __init__(self, folder, world_size, *arguments):
        self.folder, self.status = Path(folder), {}
        self.folder.mkdir(exist_ok=True)
        places = (world_size, _free_port(), self.folder, list(map(str, arguments)))
        self._processes = [FORK.Process(target=_run_rank, args=(rank, *places)) for rank in range(world_size)]
        for process in self._processes:
            process.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._processes:
            process.kill()
            process.join()
            process.close()

    @property
    def alive(self):
        return [process.is_alive() for process in self._processes]

    @property
    def pids(self):
        return [process.pid for process in self._processes]

    def send(self, rank, number):
        os.kill(self.pids[rank], number)

    def wait(self, ranks=None):
        """The exit status of each of these ranks, all if not given."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        for rank in range(len(self._processes)) if ranks is None else ranks:
            self._processes[rank].join(deadline - time.monotonic())
            self.status[rank] = self._processes[rank].exitcode
            if self.status[rank] is None:
                self.send(rank, SHOW_STACKS)
                time.sleep(1.0)
            assert self.status[rank] is not None, f"rank {rank} goes on: {self.output(rank)}"
        return [self.status[rank] for rank in sorted(self.status)]

    def output(self, rank):
        return (self.folder / f"rank{rank}.log").read_text()

    def errors(self, rank):
        return [line for line in self.output(rank).splitlines() if line.startswith("error: ")]


def _run_rank(rank, world_size, port, folder, arguments):
    output = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, rank, world_size, world_size, "127.0.0.1", port)
    os.environ.update(zip(names, map(str, values), strict=True))
    hang_on_request()
    faulthandler.register(SHOW_STACKS, all_threads=True)
    run_cli(lambda: train.main(arguments))


def hang_on_request():
    """Let SIGUSR2 make the main thread sleep for ever, outside of any collective; other threads go on."""
    signal.signal(signal.SIGUSR2, lambda *_: time.sleep(1e6))


def wait_for_step(run, step):
    """Wait until a run has done a step."""
    wait_until(lambda: num_steps(run) >= step, f"step {step} of {run}")


def num_steps(run):
    """Steps that a run has done, as its metrics say."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def checkpoint_is_torn(run):
    """Whether a checkpoint is only half written, or half deleted."""
    return any((run / "checkpoints").glob(".step_*"))


def freeze_in_checkpoint(pid, run, rng):
    """Stop the process that writes a run's checkpoints inside one of them, at a random moment."""
    while True:
        wait_until(lambda: checkpoint_is_torn(run), f"a checkpoint of {run}", every=0.0)
        time.sleep(rng.random() * 0.003)
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: _is_stopped(pid), f"the stop of process {pid}")
        if checkpoint_is_torn(run):
            return
        os.kill(pid, signal.SIGCONT)


def _is_stopped(pid):
    """Whether all threads of a process are."""
    tasks = Path(f"/proc/{pid}/task").glob("*/stat")
    return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in tasks)


def same_bits(run, expected):
    """The name of the last checkpoint of two runs, which must be equal in every bit, and alone with whole ones."""
    ends = [checkpoints(folder)[-1] for folder in (run, expected)]
    assert ends[0].name == ends[1].name
    for kind in (WEIGHTS, *state_names(ADAMW)):
        saved, others = (saved_tensors(end, kind) for end in ends)
        assert saved.shapes == others.shapes
        assert all(torch.equal(saved.read(name), others.read(name)) for name in others.shapes), kind
    assert not checkpoint_is_torn(run)
    return ends[0].name


def wait_until(condition, what, every=0.01):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} does not come"
        time.sleep(every)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
