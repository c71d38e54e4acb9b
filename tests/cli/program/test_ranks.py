"""Which ranks a command joins or starts, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from longnet_dist.cli.program import ranks
from longnet_dist.cli.program.processes import Processes, python_options
from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.errors import ConfigError

ROOT = Path(__file__).parents[3]
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, no GPU."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """The calls of ``start_ranks``, which starts none."""
    calls: list[tuple[list[str], int]] = []

    def start(command: list[str], num_ranks: int) -> int:
        calls.append((command, num_ranks))
        return 75

    monkeypatch.setattr(ranks, "start_ranks", start)
    return calls


def worked(processes: Processes) -> list[LaunchEnvironment]:
    """What this process was told to work as, if it was not the parent of ranks."""
    done: list[LaunchEnvironment] = []
    ranks.run_on_ranks(processes, done.append)
    return done


def set_gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


def test_a_single_process_works_itself(started: list[tuple[list[str], int]]) -> None:
    assert worked(Processes(["train"])) == [LaunchEnvironment()]
    assert not started


@pytest.mark.parametrize(
    ("gpus", "processes", "expected"),
    [
        (0, Processes(["train"], asked=3), 3),
        (0, Processes(["quickstart"], on_cpus=2), 2),
        (8, Processes(["train"]), 8),
        (8, Processes(["train"], asked=4), 4),
        (2, Processes(["evaluate"], asked=2, each_gpu=False), 2),
    ],
)
def test_ranks_are_started_and_their_status_comes_through(
    gpus: int,
    processes: Processes,
    expected: int,
    started: list[tuple[list[str], int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_gpus(monkeypatch, gpus)
    with pytest.raises(SystemExit) as ended:
        worked(processes)
    assert ended.value.code == 75
    assert started == [(processes.command, expected)]


def test_evaluation_takes_one_of_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, 8)
    assert worked(Processes(["evaluate"], each_gpu=False)) == [LaunchEnvironment()]


def test_more_ranks_than_gpus_are_refused_before_they_start(
    started: list[tuple[list[str], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_gpus(monkeypatch, 2)
    with pytest.raises(ConfigError, match="--processes=3 and there are 2; use at most 2"):
        worked(Processes(["train"], asked=3))
    assert not started


def test_what_cannot_run_is_refused_before_ranks_start(started: list[tuple[list[str], int]]) -> None:
    def refuse(num_ranks: int) -> None:
        raise ConfigError(f"not on {num_ranks}")

    with pytest.raises(ConfigError, match="not on 2"):
        ranks.run_on_ranks(Processes(["train"], asked=2), lambda launch: None, refuse)
    assert not started


def test_a_rank_of_a_launcher_joins(started: list[tuple[list[str], int]], monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, 8)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    (launch,) = worked(Processes(["train"]))
    assert (launch.rank, launch.world_size) == (1, 2)
    assert worked(Processes(["train"], asked=2)) == [launch]  # what this command's own ranks are given
    with pytest.raises(ConfigError, match=r"--processes=4 would start ranks, but torchrun .* has started 2"):
        worked(Processes(["train"], asked=4))
    assert not started


def test_the_shell_of_a_single_task_of_srun_starts_ranks(
    started: list[tuple[list[str], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    with pytest.raises(SystemExit):
        worked(Processes(["train"], asked=2))
    assert started == [(["train"], 2)]


def test_a_script_of_launch_never_starts_ranks(
    started: list[tuple[list[str], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_gpus(monkeypatch, 8)
    assert worked(Processes(["train"], starts=False)) == [LaunchEnvironment()]
    assert not started


def run_launcher(folder: Path, rank_program: str, **options: int) -> subprocess.CompletedProcess[str]:
    """``start_ranks`` in a process of its own, with ranks that run a program instead of ``longnet``."""
    parent = (
        "import sys\n"
        "from longnet_dist.cli.program import ranks\n"
        f"ranks.python_options = lambda: ['-u', '-c', {rank_program!r}]\n"
        "sys.exit(ranks.start_ranks(['word'], 2))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(ROOT)
    started = subprocess.Popen(
        [sys.executable, "-c", parent],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if number := options.get("signal"):
            while len(list(folder.glob("ready*"))) < 2:
                assert started.poll() is None
                time.sleep(0.05)
            started.send_signal(number)
        out, err = started.communicate(timeout=120)
    finally:
        started.kill()
        started.wait()
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)


@pytest.mark.parametrize("status", [0, 2, 69, 75, 130])
def test_the_first_status_comes_through(tmp_path: Path, status: int) -> None:
    program = (
        f"import os, sys, time; sys.exit({status}) if os.environ['RANK'] == '1' else time.sleep({60 * (status > 0)})"
    )
    done = run_launcher(tmp_path, program)
    assert done.returncode == status, done.stderr
    told = f"rank 1 was the first to end, with status {status}\n" if status else ""
    assert (done.stdout, done.stderr) == ("", told)


def test_a_rank_that_is_killed_gives_the_status_of_shells(tmp_path: Path) -> None:
    done = run_launcher(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == 137
    assert "killed by signal 9\n" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_stop_reaches_the_ranks(tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "import os, signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(75))\n"
        "open(f\"ready{os.environ['RANK']}\", 'w').close()\n"
        "time.sleep(60)"
    )
    done = run_launcher(tmp_path, program, signal=number)
    assert done.returncode == 75, done.stderr
    assert "with status 75" in done.stderr


def test_ctrl_c_ends_the_ranks(tmp_path: Path) -> None:
    program = (
        "import os, time\n"
        "open(f\"ready{os.environ['RANK']}\", 'w').close()\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    open(f\"ended{os.environ['RANK']}\", 'w').close()\n"
        "    raise SystemExit(130)"
    )
    done = run_launcher(tmp_path, program, signal=signal.SIGINT)
    assert done.returncode == 130, done.stderr
    assert sorted(file.name for file in tmp_path.glob("ended*")) == ["ended0", "ended1"]


def test_a_rank_does_not_import_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "-P" in python_options()
    monkeypatch.chdir(ROOT)  # where the package itself may have been found
    assert "-P" not in python_options()


def test_children_are_found_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert child.pid in ranks._children()
        monkeypatch.setattr(ranks, "PROC", tmp_path)
        ps = tmp_path / "ps"
        ps.write_text(f"#!/bin/sh\necho ' {child.pid} {os.getpid()}'\necho ' 1 0'\n")
        ps.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert ranks._children() == [child.pid]
    finally:
        child.communicate(b"\n")
