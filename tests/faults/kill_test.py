"""Kill a rank of a 2-rank run with SIGKILL, again and again, and compare what is left with an undisturbed run.

    python -m tests.faults.kill_test                 30 kills at random times
    python -m tests.faults.kill_test --in-checkpoint 30 kills while a checkpoint is being written

The run is one ``torchrun --max-restarts`` with train.resume=auto. It passes if its final parameters and optimizer
states are those of the undisturbed run to the last bit.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from longnet_dist.train.checkpoint import TENSOR_FILES, checkpoints
from tests.train.runs import TINY, write_corpus

ROOT = Path(__file__).parents[2]
STEPS_PER_KILL = 8
STALL_SECONDS = 300.0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--in-checkpoint", action="store_true", help="only while a checkpoint is being written")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(kill_test(Path(folder), options.kills, options.in_checkpoint, options.seed))


def kill_test(folder, kills, in_checkpoint, seed=0):
    """Do it; return what to say of it. Raises AssertionError if anything is different."""
    data = write_corpus(folder / "source.tokens")
    for name in ("killed", "whole"):
        text = TINY.replace("RUN", str(folder / name)).replace("DATA", str(data))
        (folder / f"{name}.yaml").write_text(text)
    settings = [f"train.steps={STEPS_PER_KILL * (kills + 1)}", f"train.checkpoint_every={1 if in_checkpoint else 3}"]
    rng, killed, torn, began = random.Random(seed), [], 0, time.monotonic()
    with open(folder / "log", "w") as log:
        job = start(folder / "killed.yaml", settings, kills, log)
        try:
            while len(killed) < kills:
                wait = wait_for_checkpoint if in_checkpoint else wait_a_while
                wait(job, folder / "killed", rng)
                ranks = workers(job.pid)
                killed.append(ranks[0] if in_checkpoint else rng.choice(ranks))  # rank 0 writes checkpoints
                os.kill(killed[-1], signal.SIGKILL)
                wait_until(job, lambda: killed[-1] not in workers(job.pid))
                torn += any(partial_checkpoints(folder / "killed"))
            status = job.wait(STALL_SECONDS)
        finally:
            job.kill()
        assert status == 0, (folder / "log").read_text()[-5000:]
        seconds = time.monotonic() - began
        assert start(folder / "whole.yaml", settings, 0, log).wait(STALL_SECONDS) == 0
    ends = [checkpoints(folder / name)[-1] for name in ("killed", "whole")]
    assert ends[0].name == ends[1].name
    for name in TENSOR_FILES:
        tensors, expected = (load_file(end / name) for end in ends)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected), name
    left = [path.name for path in (folder / "killed" / "checkpoints").iterdir() if not path.name.startswith("step_")]
    assert not left, left
    when = "of the writer in a checkpoint" if in_checkpoint else "at random times"
    return (
        f"{len(killed)} kills {when}, {torn} of which left a checkpoint half written; as many recoveries, "
        f"{seconds:.0f} s: {ends[0].name} is equal in every bit"
    )


def start(config, settings, restarts, log):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", str(ROOT / "launch" / "train.py"), str(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *settings], stdout=log, stderr=log, env=environment)


def wait_a_while(job, run, rng):
    """Some steps and a moment, or, every fourth time, a moment after the ranks were started."""
    wait_until(job, lambda: len(workers(job.pid)) == 2)
    if rng.random() < 0.75:
        steps = num_steps(run) + rng.randrange(1, STEPS_PER_KILL)
        wait_until(job, lambda: num_steps(run) >= steps)
        time.sleep(rng.random() * 0.1)
    else:
        time.sleep(rng.random() * 5)


def wait_for_checkpoint(job, run, rng):
    """The folder of a checkpoint that has no name yet, after some steps."""
    steps = num_steps(run) + rng.randrange(1, STEPS_PER_KILL)
    wait_until(job, lambda: num_steps(run) >= steps)
    wait_until(job, lambda: any(partial_checkpoints(run)), every=0.0)
    time.sleep(rng.random() * 0.003)


def partial_checkpoints(run):
    return (run / "checkpoints").glob(".step_*")


def workers(agent):
    """The ranks that a torchrun has started, in the order of their start."""
    return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split() if is_rank(pid)]


def is_rank(pid):
    try:
        return b"launch/train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def num_steps(run):
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_until(job, condition, every=0.01):
    deadline = time.monotonic() + STALL_SECONDS
    while not condition():
        assert job.poll() is None, f"the run ended with status {job.returncode}"
        assert time.monotonic() < deadline, "the run does not go on"
        time.sleep(every)


if __name__ == "__main__":
    main()
