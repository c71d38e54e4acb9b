"""Let 2 CPU ranks meet faults of all kinds, one after another, and compare what is left with an undisturbed run.

    python -m tests.faults.random_faults [--faults 100] [--seed 0] [--parts] [--torchrun] [--output FILE]

Whenever the ranks have ended, they are started again with the same command, by torchrun itself with ``--torchrun``. The
run passes if its final parameters and optimizer states are those of the undisturbed run to the last bit. The kinds:

    kill        SIGKILL of a random rank
    pause       SIGSTOP for a moment, then SIGCONT
    freeze      SIGSTOP for ever: the other rank ends at its time-out
    hang        the main thread of a rank sleeps for ever outside a collective, while its heart beats
    full disk   the file system of the run's folder is full for a while
    lost folder the run's folder is away for a while

``test_random_faults.py`` has a short form. ``--output`` adds what was seen to a JSON file.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.record import environment
from longnet_dist.checkpoint.format import checkpoints
from tests.faults.disks import full, small_disk
from tests.faults.kill_test import start as start_torchrun
from tests.faults.kill_test import workers
from tests.faults.ranks import Ranks, num_steps, same_bits, wait_until
from tests.train.runs import write_config, write_corpus

STEPS_PER_FAULT = 12  # of which some pass during the fault
MAX_STEPS_BETWEEN = 4
TIMEOUT_SECONDS = 12.0
ENDING = ("kill", "freeze", "hang")
KINDS = (*ENDING, "pause", "full disk", "lost folder")
OF_TORCHRUN = ("kill", "pause", "freeze", "hang")
ALLOWED_STATUS = {69, 2, -signal.SIGKILL}  # 2 only while the disk is full or the folder away


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", action="store_true", help="each rank writes a part of every checkpoint")
    parser.add_argument("--torchrun", action="store_true", help="torchrun starts the ranks again")
    parser.add_argument("--output", type=Path, help="JSON file to add the result to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        series = under_torchrun if options.torchrun else random_faults
        result = series(Path(folder), options.faults, options.seed, options.parts)
    print(f"{result}: equal in every bit")
    if options.output:
        before = json.loads(options.output.read_text()) if options.output.exists() else []
        words = [word for word in sys.argv[1:] if word != "--output" and word != str(options.output)]
        command = " ".join(["python", "-m", "tests.faults.random_faults", *words])
        before.append({"command": command, "environment": environment(), **result})
        options.output.write_text(json.dumps(before, indent=1) + "\n")


def random_faults(folder, faults, seed, parts=False, kinds=KINDS):
    """Do it; return what was seen. Raises AssertionError if anything is different."""
    rng, seen, starts, began = random.Random(seed), Counter(), 0, time.monotonic()
    data, config = write_corpus(folder / "source.tokens"), None
    with small_disk(folder / "disk", 16) as (disk, is_small):
        kinds = [kind for kind in kinds if is_small or kind != "full disk"]
        config = write_config(folder, "faulty", data)
        run = disk / "run"
        words = [config, *settings(faults, parts), f"train.output_dir={run}"]
        # Each kind about equally often, in random order.
        plan = [kinds[number % len(kinds)] for number in range(faults)]
        rng.shuffle(plan)
        while True:
            starts += 1
            with Ranks(folder / "logs", 2, *words) as ranks:
                while plan and goes_on(ranks, run, num_steps(run) + rng.randrange(1, MAX_STEPS_BETWEEN)):
                    kind = plan.pop()
                    seen[kind] += 1
                    if meet(kind, ranks, run, disk, rng):
                        break
                else:
                    status = ranks.wait()
                    if status == [0, 0]:
                        break
                    check(status, ranks)
                if ranks.status:
                    check([ranks.status[rank] for rank in sorted(ranks.status)], ranks)
        assert not plan, f"the run ended before {len(plan)} of its faults"
        expected = undisturbed(folder, data, faults, parts)
        end = same_bits(run, expected)
    return {
        "faults": faults, "by_kind": dict(seen), "launcher": "longnet train, started again", "parts": parts,
        "seed": seed, "starts": starts, "seconds": time.monotonic() - began, "end": end,
    }  # fmt: skip


def settings(faults, parts):
    steps = STEPS_PER_FAULT * (faults + 1)
    timeout = f"parallel.timeout_minutes={TIMEOUT_SECONDS / 60}"
    how = f"train.checkpoint_parts={'ranks' if parts else 'auto'}"
    # Many faults may be in a row, and none of them may end the run.
    return [f"train.steps={steps}", "train.checkpoint_every=2", "train.checkpoint_failures=1000000", timeout, how]


def undisturbed(folder, data, faults, parts):
    config = write_config(folder, "whole", data)
    with Ranks(folder / "logs", 2, config, *settings(faults, parts)) as ranks:
        assert ranks.wait() == [0, 0], ranks.output(0)
    return folder / "whole"


def goes_on(ranks, run, step):
    """Wait for a step; say whether the ranks have come so far, instead of to an end."""
    wait_until(lambda: num_steps(run) >= step or not any(ranks.alive), f"step {step}")
    return all(ranks.alive)


def meet(kind, ranks, run, disk, rng):
    """Let the ranks meet a fault; return whether they have ended."""
    rank = rng.randrange(2)
    if kind == "kill":
        ranks.send(rank, signal.SIGKILL)
    elif kind == "freeze":
        ranks.send(rank, signal.SIGSTOP)
        ranks.wait([1 - rank])
        with suppress(ProcessLookupError):
            ranks.send(rank, signal.SIGKILL)  # as its launcher does once the other rank has ended
    elif kind == "hang":
        ranks.send(rank, signal.SIGUSR2)
    elif kind == "pause":
        ranks.send(rank, signal.SIGSTOP)
        time.sleep(rng.random() * 1.5)
        ranks.send(rank, signal.SIGCONT)
    elif kind == "full disk":
        with full(disk):
            time.sleep(rng.random() * 1.5)
    else:
        with away(run):
            time.sleep(rng.random() * 1.5)
    if kind in ENDING:
        ranks.wait()
        return True
    return False


def check(status, ranks):
    assert set(status) <= ALLOWED_STATUS, (status, ranks.output(0)[-3000:], ranks.output(1)[-3000:])
    for rank in range(2):
        # A thread of TensorBoard, which has lost its file, shows one; the logger then says that it records no more.
        text = re.sub(r"Exception in thread Thread-\d+[^:]*:\nTraceback", "", ranks.output(rank))
        assert "Traceback" not in text, text[-5000:]


@contextmanager
def away(run):
    """Take a run's folder away, and bring it back; nothing may have been put in its place."""
    aside = run.with_name("away")
    run.rename(aside)
    try:
        yield
    finally:
        assert not run.exists(), f"{[str(path) for path in run.rglob('*')]} was written into a lost folder"
        aside.rename(run)


def under_torchrun(folder, faults, seed, parts=False):
    """The same with one torchrun that starts the ranks again."""
    rng, seen, began = random.Random(seed), Counter(), time.monotonic()
    data = write_corpus(folder / "source.tokens")
    config, run = write_config(folder, "faulty", data), folder / "faulty"
    plan = [OF_TORCHRUN[number % len(OF_TORCHRUN)] for number in range(faults)]
    rng.shuffle(plan)
    with open(folder / "log", "w") as log:
        job = start_torchrun(config, settings(faults, parts), faults, log, Path(__file__).with_name("train_or_hang.py"))

        def wait(condition, what):
            def happens_or_ended():
                assert job.poll() is None, f"the run ended: {(folder / 'log').read_text()[-5000:]}"
                return condition()

            wait_until(happens_or_ended, what)

        try:
            for kind in plan:
                seen[kind] += 1
                wait(lambda: len(workers(job.pid)) == 2, "two ranks")
                goal = num_steps(run) + rng.randrange(1, MAX_STEPS_BETWEEN)
                wait(lambda goal=goal: num_steps(run) >= goal, f"step {goal}")
                old = workers(job.pid)
                rank = rng.choice(old)
                number = {"kill": signal.SIGKILL, "hang": signal.SIGUSR2}.get(kind, signal.SIGSTOP)
                os.kill(rank, number)
                if kind == "pause":
                    time.sleep(rng.random() * 1.5)
                    os.kill(rank, signal.SIGCONT)
                else:
                    wait(lambda old=old: not set(old) & set(workers(job.pid)), f"the end of the ranks after {kind}")
            status = job.wait()
        finally:
            job.kill()
        assert status == 0, (folder / "log").read_text()[-5000:]
    end = same_bits(run, undisturbed(folder, data, faults, parts))
    return {
        "faults": faults, "by_kind": dict(seen), "launcher": "torchrun --max-restarts", "parts": parts,
        "seed": seed, "seconds": time.monotonic() - began, "end": end, "checkpoints": len(checkpoints(run)),
    }  # fmt: skip


if __name__ == "__main__":
    main()
