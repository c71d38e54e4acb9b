"""Run experiments on all GPUs of a machine until the time is over; the same command goes on.

    python -m benchmarks.learning --data linux.tokens --minutes 9 --results results

Trainings come in the order of the experiments, which is that of their value, and begin as soon as a GPU is free and the
runs whose weights they need are finished; what only measures a finished training comes first. With ``--per-gpu 2`` one
run computes while another starts, compiles or reads. What is known so far is copied to the folder of results: JSON,
tables and pictures, no weights. ``--records`` takes such a folder, so that another machine does not repeat its runs.
The last lines say how each run ended.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from longnet_dist.data.token_file import TokenFile
from longnet_dist.errors import REQUEUE_STATUS
from longnet_dist.experiments.plan import Experiment, Run, runs_of
from longnet_dist.experiments.report import write_report
from longnet_dist.experiments.runner import is_finished
from longnet_dist.machine import usable_cores

BY_VALUE = ("context", "retrieval", "variants", "adapt", "compute", "prompt", "size")
WAIT_SECONDS = 1.0
GRACE_SECONDS = 24.0  # for the last checkpoint
WITHOUT_TEXT = ("retrieval", "distance")


@dataclass(frozen=True)
class Job:
    """A run of an experiment, and the folders of trainings that must be finished before it begins."""

    run: Run

    @property
    def name(self) -> str:
        """Return the names of experiment and run."""
        return f"{self.run.experiment.name}/{self.run.key}"

    @property
    def trains(self) -> bool:
        """Say whether this job is the one that trains its folder."""
        return self.run.plan.trained is None

    @property
    def needs(self) -> set[Path]:
        """Return the folders of trainings of other jobs."""
        folders = {self.run.init_folder} if self.run.init_folder else set()
        return folders if self.trains else folders | {self.run.folder}


class Schedule:
    """Hand out jobs to workers, each once, as soon as it can begin.

    Args:
        jobs: in order of their value.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.waiting = [job for job in jobs if not is_finished(job.run)]
        self.ended: dict[str, int] = {}
        # What nobody trains here is there already, or is trained by the first job that needs it.
        self._awaited = {job.run.folder for job in self.waiting if job.trains}
        self._busy: set[Path] = set()
        self._lock = threading.Lock()

    def take(self) -> Job | None:
        """Return the next job that can begin, one that only measures if there is one; None if there is none now."""
        with self._lock:
            for job in sorted(self.waiting, key=lambda job: job.trains):
                if not job.needs & self._awaited and job.run.folder not in self._busy:
                    self.waiting.remove(job)
                    self._busy.add(job.run.folder)
                    return job
        return None

    def end(self, job: Job, status: int) -> None:
        """Note how a job ended; only 0 lets those begin that need it."""
        with self._lock:
            self.ended[job.name] = status
            self._busy.discard(job.run.folder)
            if status == 0 and job.trains:
                self._awaited.discard(job.run.folder)

    def work(self, do: Callable[[Job], int], is_over: Callable[[], bool]) -> None:
        """Do jobs until there is none left that could begin, or the time is over."""
        while not is_over():
            job = self.take()
            if job is not None:
                self.end(job, do(job))
            elif self.waiting and self._busy:
                time.sleep(WAIT_SECONDS)
            else:
                return


def jobs_of(names: Sequence[str], output: Path, data: Path | None, smoke: bool = False) -> list[Job]:
    """Return the jobs of experiments, in order."""
    vocab_size = TokenFile.open(data).tokenizer.vocab_size if data else None
    jobs = []
    for name in names:
        text = {} if name in WITHOUT_TEXT else {"data": data, "vocab_size": vocab_size}
        jobs += [Job(run) for run in runs_of(Experiment.read(name, smoke), (), output, **text)]
    return jobs


def restore_records(names: Sequence[str], folder: Path, output: Path, smoke: bool = False) -> int:
    """Put the records of the reports in ``folder`` where runs below ``output`` leave theirs; return their number.

    A record that is there already stays.
    """
    restored = 0
    for name in names:
        if not (report := folder / f"{name}.json").exists():
            continue
        results = Experiment.read(name, smoke).folder(output) / "results"
        results.mkdir(parents=True, exist_ok=True)
        for record in json.loads(report.read_text(encoding="utf-8"))["records"]:
            place = results / f"{record['run']}-seed{record['seed']}.json"
            if not place.exists():
                place.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                restored += 1
    return restored


def command_of(job: Job, data: Path | None, minutes: float) -> list[str]:
    """Return the command that does a job."""
    words = [sys.executable, "-m", "longnet_dist", "experiment", job.run.experiment.name, "--runs", job.run.key]
    words += ["--output", str(job.run.output), "--minutes", f"{max(minutes, 0.001):.3f}"]
    words += ["--smoke"] if job.run.experiment.smoke else []
    return words if data is None or job.run.experiment.name in WITHOUT_TEXT else [*words, "--data", str(data)]


def run_until(command: Sequence[str], deadline: float, log: IO[str], variables: dict[str, str]) -> int:
    """Run a command and return its status; what still runs at ``deadline`` (monotonic seconds) is ended."""
    process = subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log)
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        process.wait(GRACE_SECONDS / 3)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return REQUEUE_STATUS


def main(arguments: Sequence[str] | None = None) -> None:
    """Run experiments as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", default=list(BY_VALUE), help="default: all but distance, by value")
    parser.add_argument("--data", type=Path, help="token file of the text")
    parser.add_argument("--output", type=Path, default=Path("experiments"), help="folder of runs (default %(default)s)")
    parser.add_argument("--results", type=Path, help="folder to which what is known is copied")
    parser.add_argument("--records", type=Path, help="folder of results of another machine, whose runs are finished")
    parser.add_argument("--per-gpu", type=int, default=1, help="runs on a GPU at the same time (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="end after so long (default %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="the sizes for a CPU")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    if options.records:
        print(f"{restore_records(options.experiments, options.records, options.output, options.smoke)} runs restored")
    gpus = ([str(number) for number in range(torch.cuda.device_count())] or [""]) * options.per_gpu
    schedule = Schedule(jobs_of(options.experiments, options.output, options.data, options.smoke))
    threads_of_one = {"OMP_NUM_THREADS": str(max(1, usable_cores() // len(gpus)))}
    logs = options.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def worker(gpu: str) -> None:
        def do(job: Job) -> int:
            command = command_of(job, options.data, (end - time.monotonic()) / 60)
            with (logs / f"{job.name.replace('/', '-')}.log").open("a") as log:
                return run_until(command, end + GRACE_SECONDS, log, {"CUDA_VISIBLE_DEVICES": gpu} | threads_of_one)

        schedule.work(do, lambda: time.monotonic() > end)

    threads = [threading.Thread(target=worker, args=(gpu,)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _report(options.experiments, options)
    for name, status in schedule.ended.items():
        state = {0: "finished", REQUEUE_STATUS: "goes on"}.get(status, f"FAILED with {status}")
        print(f"{state:<18} {name}")
    print(f"{len(schedule.waiting)} runs wait: {', '.join(job.name for job in schedule.waiting) or '-'}")


def _report(names: Sequence[str], options: argparse.Namespace) -> None:
    """Write the reports once more, since runs that end together may write them together, and copy them."""
    for name in names:
        files = write_report(Experiment.read(name, options.smoke), options.output)
        if files:
            print(next(file for file in files if file.suffix == ".md").read_text(encoding="utf-8"))
        for file in files if options.results else ():
            options.results.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, options.results)


if __name__ == "__main__":
    main()
