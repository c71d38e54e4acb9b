"""Kill a rank of a 2-rank run with SIGKILL, again and again, and compare what is left with an undisturbed run.

    python -m tests.faults.kill_test                 30 kills of a random rank at random times
    python -m tests.faults.kill_test --in-checkpoint 30 kills of rank 0 while it writes a checkpoint

The run is one ``torchrun --max-restarts`` with train.resume=auto. It passes if its final parameters and optimizer
states are those of the undisturbed run to the last bit. ``test_kill.py`` has a short form. ``--output`` adds what was
seen to a JSON file.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import environment
from tests.faults.ranks import checkpoint_is_torn, freeze_in_checkpoint, num_steps, same_bits, wait_until
from tests.train.runs import write_config, write_corpus

ROOT = Path(__file__).parents[2]
STEPS_PER_KILL = 8


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--in-checkpoint", action="store_true", help="only while a checkpoint is being written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to add the result to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = kill_test(Path(folder), options.kills, options.in_checkpoint, options.seed)
    print(
        "{kills} kills {killed}, {torn} of which left a checkpoint half written; as many recoveries, {seconds:.0f} s: "
        "{end} is equal in every bit".format(**result)
    )
    if options.output:
        before = json.loads(options.output.read_text()) if options.output.exists() else []
        command = " ".join(["python", "-m", "tests.faults.kill_test", *["--in-checkpoint"] * options.in_checkpoint])
        before.append({"command": command, "environment": environment(), **result})
        options.output.write_text(json.dumps(before, indent=1) + "\n")


def kill_test(folder, kills, in_checkpoint, seed=0):
    """Do it; return what was seen. Raises AssertionError if anything is different."""
    data, run = write_corpus(folder / "source.tokens"), folder / "killed"
    configs = [write_config(folder, name, data) for name in ("killed", "whole")]
    settings = [f"train.steps={STEPS_PER_KILL * (kills + 1)}", f"train.checkpoint_every={1 if in_checkpoint else 3}"]
    rng, torn, began = random.Random(seed), 0, time.monotonic()
    with open(folder / "log", "w") as log:
        job = start(configs[0], settings, kills, log)
        try:
            for _ in range(kills):
                killed = (wait_for_checkpoint if in_checkpoint else wait_a_while)(job, run, rng)
                os.kill(killed, signal.SIGKILL)
                wait(job, lambda killed=killed: killed not in workers(job.pid))
                torn += checkpoint_is_torn(run)
            status = job.wait()
        finally:
            job.kill()
        assert status == 0, (folder / "log").read_text()[-5000:]
        seconds = time.monotonic() - began
        assert start(configs[1], settings, 0, log).wait() == 0
    end = same_bits(run, folder / "whole")
    killed = "of rank 0 in a checkpoint" if in_checkpoint else "of a random rank at random times"
    return {"kills": kills, "killed": killed, "torn": torn, "seconds": seconds, "end": end}


def start(config, settings, restarts, log, script=ROOT / "launch" / "train.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", str(script), str(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *settings], stdout=log, stderr=log, env=environment)


def wait_a_while(job, run, rng):
    """Some steps and a moment, or, every fourth time, a moment after the ranks were started; then a random rank."""
    wait(job, lambda: len(workers(job.pid)) == 2)
    if rng.random() < 0.75:
        steps = num_steps(run) + rng.randrange(1, STEPS_PER_KILL)
        wait(job, lambda: num_steps(run) >= steps)
        time.sleep(rng.random() * 0.1)
    else:
        time.sleep(rng.random() * 5)
    return rng.choice(workers(job.pid))


def wait_for_checkpoint(job, run, rng):
    """Some steps, then a checkpoint that is being written; rank 0, which writes it, frozen."""
    steps = num_steps(run) + rng.randrange(1, STEPS_PER_KILL)
    wait(job, lambda: num_steps(run) >= steps)
    writer = workers(job.pid)[0]
    freeze_in_checkpoint(writer, run, rng)
    return writer


def workers(agent):
    """The ranks that a torchrun has started, in the order of their start."""
    return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split() if is_rank(pid)]


def is_rank(pid):
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return any(script in command for script in (b"launch/train.py", b"faults/train_or_hang.py"))
    except OSError:
        return False


def wait(job, condition):
    def happens_or_ended():
        assert job.poll() is None, f"the run ended with status {job.returncode}"
        return condition()

    wait_until(happens_or_ended, "what the run should do next")


if __name__ == "__main__":
    main()
