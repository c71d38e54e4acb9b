"""The batch script and srun, on a real SLURM of two nodes on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from longnet_dist.checkpoint.format import checkpoints, step_of
from tests.train.runs import write_config, write_corpus

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
MISSING = [name for name in PROGRAMS if not shutil.which(name)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} (Debian: slurm-wlm, munge)"),
    pytest.mark.skipif(os.getuid() != 0, reason="the daemons of SLURM need root"),
]

ENDS = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of commands that talk to it."""
    script, folder = ROOT / "tests" / "cluster" / "slurm.sh", tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run([script, "start", folder, "2"], check=True, timeout=60, stdout=subprocess.DEVNULL)
        yield os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    finally:
        subprocess.run([script, "stop", folder], check=True, timeout=60)


@pytest.fixture
def config(tmp_path):
    data = write_corpus(tmp_path / "source.tokens")
    return write_config(tmp_path, "run", data)


def command(cluster, *words):
    return subprocess.run(words, env=cluster, check=True, capture_output=True, text=True, timeout=120).stdout.strip()


def submit(cluster, config, *settings):
    """Send the shipped script off from a folder that looks like a checkout but takes the logs; the job and its log."""
    checkout = config.parent / "checkout"
    checkout.mkdir()
    for name in ("launch", "longnet_dist"):
        (checkout / name).symlink_to(ROOT / name)
    words = ("--parsable", f"--chdir={checkout}", "--time=10", str(ROOT / "launch/slurm/train.sbatch"))
    job = command(cluster | {"RANKS_PER_NODE": "1"}, "sbatch", *words, str(config), *settings)
    return job, checkout / f"longnet-{job}.log"


def wait_for(what, condition, log, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        text = log.read_text() if log.exists() else "no log"
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s:\n{text}"
        time.sleep(0.2)


def state(cluster, job):
    return command(cluster, "squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T")


def steps(folder):
    file = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def ranks_of(config):
    """The processes of a job that train."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = file.read_bytes().split(b"\0")
            if b"launch/train.py" in words and str(config).encode() in words and b"--nproc" not in file.read_bytes():
                found.append(int(file.parent.name))
    return sorted(found)


def test_a_job_on_two_nodes_stops_on_a_signal_is_queued_again_and_finishes(cluster, config):
    run = config.parent / "run"
    job, log = submit(cluster, config, "train.steps=14", "train.checkpoint_every=1000")
    wait_for("the fifth step", lambda: len(steps(run)) >= 5, log)
    command(cluster, "scancel", f"--signal={signal.SIGUSR1.name[3:]}", job)
    wait_for("the end of the job", lambda: state(cluster, job) in ENDS, log)
    text = log.read_text()
    assert state(cluster, job) == "COMPLETED", text
    assert "stopped at a checkpoint; requeued" in text
    assert "start 1 on node[1-2], 1 ranks a node" in text
    assert "Traceback" not in text
    assert "closing signal" not in text, "torch's launcher says more than the ranks about a regular stop"
    assert steps(run) == list(range(1, 15))
    logs = log.parent / "runs" / "slurm" / job
    for start in ("start0", "start1"):
        for node in ("node0", "node1"):
            assert len(list((logs / start / node).glob("*/attempt_0/0/stderr.log"))) == 1


def test_a_preempted_job_is_queued_again_and_finishes(cluster, config):
    run = config.parent / "run"
    job, log = submit(cluster, config, "train.steps=14", "train.checkpoint_every=5")
    wait_for("the seventh step", lambda: len(steps(run)) >= 7, log)
    urgent = ("--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    other = command(cluster, "sbatch", *urgent)
    wait_for("the end of the other job", lambda: state(cluster, other) == "COMPLETED", log)
    wait_for("the end of the job", lambda: state(cluster, job) in ENDS, log)
    text = log.read_text()
    assert state(cluster, job) == "COMPLETED", text
    assert "DUE TO PREEMPTION" in text
    assert "start 1 on node[1-2]" in text
    assert "Traceback" not in text
    assert steps(run) == list(range(1, 15))
    assert not (log.parent / "runs" / "slurm" / job / "failures").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_its_job_which_is_queued_again_and_finishes(cluster, config, number):
    run = config.parent / "run"
    settings = ("train.steps=14", "train.checkpoint_every=5", "parallel.timeout_minutes=0.2")
    job, log = submit(cluster, config, *settings)
    wait_for("the seventh step", lambda: len(steps(run)) >= 7, log)
    os.kill(ranks_of(config)[-1], number)
    wait_for("the end of the job", lambda: state(cluster, job) in ENDS, log)
    text = log.read_text()
    assert state(cluster, job) == "COMPLETED", text
    assert "requeued, to go on from the newest checkpoint" in text
    assert ("did not answer for" if number == signal.SIGSTOP else "lost another rank") in text
    assert "at the launcher" not in text, "a rank that is named is somewhere in the package"
    assert steps(run) == list(range(1, 15))


def test_a_cancelled_job_leaves_a_checkpoint_and_is_not_queued_again(cluster, config):
    run = config.parent / "run"
    job, log = submit(cluster, config, "train.steps=100000", "train.checkpoint_every=100000")
    wait_for("the third step", lambda: len(steps(run)) >= 3, log)
    command(cluster, "scancel", job)
    wait_for("the end of the job", lambda: state(cluster, job) in ENDS, log)
    wait_for("the end of its processes", lambda: not ranks_of(config), log)
    assert state(cluster, job) == "CANCELLED", log.read_text()
    assert "requeued" not in log.read_text()
    (checkpoint,) = checkpoints(run)
    assert step_of(checkpoint) == len(steps(run))


def test_a_mistake_is_not_queued_again(cluster, config):
    job, log = submit(cluster, config, "train.stepz=3")
    wait_for("the end of the job", lambda: state(cluster, job) in ENDS, log)
    text = log.read_text()
    assert state(cluster, job) == "FAILED", text
    assert "error: there is no key train.stepz; the nearest is train.steps" in text
    assert "start 1" not in text
    assert "ExitCode=2:0 " in command(cluster, "scontrol", "--oneliner", "show", "job", job)


def test_srun_can_start_every_rank_itself(cluster, config):
    words = ("srun", "--nodes=2", "--ntasks=2", f"--chdir={ROOT}", sys.executable, "launch/train.py", str(config))
    command(cluster | {"PYTHONPATH": str(ROOT)}, *words, "parallel.sequence=2")
    assert steps(config.parent / "run") == [1, 2, 3, 4]
