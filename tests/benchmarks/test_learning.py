"""Runs are handed out by value, and after the runs whose weights they need."""

import json
import sys
import time

import pytest

from benchmarks import learning
from longnet_dist.errors import REQUEUE_STATUS
from longnet_dist.experiments import experiment_names


def schedule_of(folder, *names):
    return learning.Schedule(learning.jobs_of(names, folder, None))


def test_every_experiment_with_a_training_has_its_place():
    assert sorted([*learning.BY_VALUE, "distance"]) == experiment_names()


@pytest.mark.parametrize("workers", [1, 3])
def test_jobs_begin_after_the_trainings_that_they_need(tmp_path, workers):
    names = ("adapt", "prompt", "context", "compute")
    schedule = schedule_of(tmp_path, *names)
    total = len(schedule.waiting)
    running, trained, ended = [], set(), []
    while running or schedule.waiting:
        while len(running) < workers and (job := schedule.take()):
            assert job.needs <= trained
            assert job.run.folder not in {other.run.folder for other in running}
            running.append(job)
        job = running.pop(0)
        schedule.end(job, 0)
        trained.add(job.run.folder)
        ended.append(job.name)
    assert len(ended) == len(set(ended)) == total
    assert ended.index("compute/full-8k-seed0") < ended.index("adapt/full-seed0") < ended.index("adapt/dilated-seed0")
    first = next(name for name in ended if not name.startswith("context"))
    assert ended.index("context/full-2k-seed0") < ended.index("prompt/full-2k-seed0")
    assert first


def test_what_needs_a_failed_training_does_not_begin(tmp_path):
    schedule = schedule_of(tmp_path, "context", "prompt")
    schedule.work(lambda job: int(job.name == "context/full-2k-seed0"), lambda: False)
    assert [job.name for job in schedule.waiting] == ["prompt/full-2k-seed0"]
    assert schedule.ended["prompt/dilated-32k-seed0"] == 0


def test_nothing_begins_when_the_time_is_over(tmp_path):
    schedule = schedule_of(tmp_path, "size")
    schedule.work(lambda job: pytest.fail("began"), lambda: True)
    assert len(schedule.waiting) == 4


def test_what_runs_too_long_is_ended(tmp_path):
    with (tmp_path / "log").open("w") as log:
        words = [sys.executable, "-c", "import os, time; print(os.environ['A'], flush=True); time.sleep(60)"]
        assert learning.run_until(words, time.monotonic() + 2, log, {"A": "text"}) == REQUEUE_STATUS
        assert learning.run_until([sys.executable, "-c", "raise SystemExit(3)"], time.monotonic() + 60, log, {}) == 3


def test_reports_are_copied_and_finished_runs_are_left_out(tmp_path, capsys):
    words = ["distance", "--smoke", "--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    learning.main(words)
    printed = capsys.readouterr().out
    assert "finished           distance/paper-seed0" in printed
    assert "finished           distance/geometric-seed0" in printed
    assert "| paper | 32K | causal | 3 | 1.781 |" in printed
    assert printed.endswith("0 runs wait: -\n")
    assert sorted(file.name for file in (tmp_path / "results").iterdir()) == [
        f"distance.{x}" for x in ("json", "md", "png")
    ]
    assert len(json.loads((tmp_path / "results" / "distance.json").read_text())["records"]) == 2
    learning.main(words)
    assert "finished  " not in capsys.readouterr().out


@pytest.mark.parametrize("minutes", [3.0, 1e-5, -1e-5])
def test_a_command_gets_minutes_that_it_takes(tmp_path, minutes):
    """The time may have just run out; the command then begins nothing."""
    job, *_ = learning.jobs_of(["distance"], tmp_path, None)
    *_, given = learning.command_of(job, None, minutes)
    assert float(given) == max(minutes, 0.001)


def test_what_measures_a_finished_training_comes_before_the_next_training(tmp_path):
    schedule = schedule_of(tmp_path, "context", "prompt")
    first = schedule.take()
    assert first.name == "context/full-2k-seed0"
    schedule.end(first, 0)
    assert schedule.take().name == "prompt/full-2k-seed0"
    assert schedule.take().name == "context/full-2k-seed1"


def test_runs_of_another_machine_are_not_repeated(tmp_path):
    (run, *_) = learning.jobs_of(["size"], tmp_path / "here", None)
    record = {"run": run.run.name, "seed": run.run.seed, **run.run.identity}
    (tmp_path / "size.json").write_text(json.dumps({"records": [record]}))
    for expected in (1, 0):
        assert learning.restore_records(["size", "adapt"], tmp_path, tmp_path / "here") == expected
    schedule = schedule_of(tmp_path / "here", "size")
    assert run.name not in [job.name for job in schedule.waiting]
    assert len(schedule.waiting) == 3
