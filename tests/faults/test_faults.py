"""What a run does when it is stopped, killed, frozen, or when the disk, the memory or the numbers give out."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file

from longnet_dist.checkpoint.format import checkpoints, tensor_files
from longnet_dist.telemetry.json_lines import read_jsonl
from tests.faults import disks
from tests.faults.ranks import Ranks, wait_for_step
from tests.train.runs import write_config

FOREVER = "train.steps=100000"


def train(folder, world_size, *arguments):
    with Ranks(folder, world_size, *arguments) as ranks:
        return ranks.wait(), ranks


def test_a_signal_to_one_rank_leaves_a_checkpoint_to_go_on_from(config, corpus, tmp_path):
    settings = ("train.warmup_steps=0", "train.decay_power=1.0e-9")  # the same rates, however many steps there are
    done = 0
    for number in (signal.SIGUSR1, signal.SIGTERM):
        with Ranks(tmp_path / "logs", 2, config, FOREVER, *settings) as ranks:
            wait_for_step(tmp_path / "run", done + 2)
            ranks.send(1, number)
            ranks.send(1, number)
            assert ranks.wait() == [75, 75]
            done = len(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
            checkpoint = checkpoints(tmp_path / "run")[-1]
            assert f"asked to stop: step {done} of 100000 is in {checkpoint}" in ranks.output(0)
            assert not ranks.errors(0) + ranks.errors(1)
    for file in (config, write_config(tmp_path, "whole", corpus)):
        assert train(tmp_path / "logs", 2, file, f"train.steps={done + 2}", *settings)[0] == [0, 0]
    ends = [checkpoints(tmp_path / name)[-1] for name in ("run", "whole")]
    for name in tensor_files():
        resumed, expected = (load_file(end / name) for end in ends)
        assert all(torch.allclose(resumed[key], expected[key], rtol=1e-4, atol=1e-6) for key in expected)


def test_a_frozen_rank_is_named_and_ends_the_run_in_time(corpus, tmp_path):
    """Two runs at once: in one the rank is frozen that keeps the store, through which the others hear of each other."""
    timeout_seconds = 20
    settings = ("parallel.data=3", "train.batch_size=3", f"parallel.timeout_minutes={timeout_seconds / 60}")
    with ExitStack() as stack:
        runs = {}
        for frozen in (0, 1):
            config = write_config(tmp_path, f"run{frozen}", corpus)
            runs[frozen] = stack.enter_context(Ranks(tmp_path / f"logs{frozen}", 3, config, FOREVER, *settings))
        for frozen, ranks in runs.items():
            wait_for_step(tmp_path / f"run{frozen}", 2)
            ranks.send(frozen, signal.SIGSTOP)
        frozen_at = time.monotonic()
        assert runs[0].wait([1, 2]) == [69, 69]
        # What is frozen does not end when its launcher asks it to; the others, its siblings, kill it.
        assert runs[1].wait() == [69, -9, 69]
        assert time.monotonic() - frozen_at < timeout_seconds
        for frozen, ranks in runs.items():
            for other in {0, 1, 2} - {frozen}:
                (error,) = ranks.errors(other)
                assert f"rank {frozen}" in error.partition("ends the run: ")[2]
                assert "did not answer for" in error
                assert frozen == 0 or re.search(r", at [a-z_]+/[a-z_]+\.py:\d+\)", error)
                assert "Traceback" not in ranks.output(other)


def test_a_rank_that_is_frozen_for_a_while_goes_on(config, tmp_path):
    """No longer than the time-out allows."""
    settings = ("train.steps=60", "train.checkpoint_every=10", "parallel.timeout_minutes=1")
    with Ranks(tmp_path / "logs", 2, config, *settings) as ranks:
        wait_for_step(tmp_path / "run", 2)
        ranks.send(1, signal.SIGSTOP)
        time.sleep(2)
        ranks.send(1, signal.SIGCONT)
        assert ranks.wait() == [0, 0]


def test_a_killed_rank_ends_the_others_with_one_message(config, tmp_path):
    with Ranks(tmp_path / "logs", 3, config, FOREVER, "parallel.data=3", "train.batch_size=3") as ranks:
        wait_for_step(tmp_path / "run", 2)
        ranks.send(1, signal.SIGKILL)
        assert ranks.wait() == [69, -9, 69]
        for rank in (0, 2):
            assert len(ranks.errors(rank)) == 1
            assert "lost another rank" in ranks.errors(rank)[0]
            assert "Traceback" not in ranks.output(rank)
            recorded = json.loads((tmp_path / "run" / "flight_recorder" / f"rank_{rank}.json").read_text())
            assert any("reduce" in entry["profiling_name"] for entry in recorded["entries"])


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 1 MB."""
    with disks.small_disk(tmp_path / "small", 1) as (folder, is_small):
        if not is_small:
            pytest.skip("a small file system needs the right to mount one")
        yield folder


def test_a_full_disk_is_one_message_and_keeps_the_checkpoint_before(config, small_disk, tmp_path):
    settings = (f"train.output_dir={small_disk / 'run'}", "train.checkpoint_every=1", "train.keep_last=0")
    status, ranks = train(tmp_path / "logs", 2, config, "train.steps=60", *settings)
    assert status == [2, 2]
    assert "cannot write the checkpoint" in ranks.errors(0)[0]
    assert "No space left on device" in ranks.errors(0)[0]
    assert "rank 0 failed: cannot write" in ranks.errors(1)[0]
    assert "Traceback" not in ranks.output(0) + ranks.output(1)
    before = [folder.name for folder in checkpoints(small_disk / "run")]
    assert before
    subprocess.run(["mount", "-o", "remount,size=9m", small_disk], check=True)
    steps = f"train.steps={len(before) + 2}"
    assert train(tmp_path / "logs", 2, config, steps, *settings)[0] == [0, 0]
    assert [folder.name for folder in checkpoints(small_disk / "run")][:-2] == before
    assert len(read_jsonl(small_disk / "run" / "metrics.jsonl")) == len(before) + 2


def test_a_folder_that_cannot_be_written(config, small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    status, ranks = train(tmp_path / "logs", 2, config, f"train.output_dir={small_disk / 'run'}")
    assert status == [2, 2]
    for rank in range(2):
        (line,) = ranks.output(rank).splitlines()
        assert line.startswith("error: train.output_dir=")
        assert line.endswith(f"{small_disk} cannot be written; use another folder")


def test_a_vanished_token_file(config, corpus, tmp_path):
    """A run that has it open goes on; one that begins says what is missing."""
    data = shutil.copy(corpus, tmp_path / "copy.tokens")
    with Ranks(tmp_path / "logs", 1, config, FOREVER, f"data.path={data}") as ranks:
        wait_for_step(tmp_path / "run", 2)
        os.unlink(data)
        wait_for_step(tmp_path / "run", 5)
        ranks.send(0, signal.SIGTERM)
        assert ranks.wait() == [75]
    status, ranks = train(tmp_path / "logs", 1, config, FOREVER, f"data.path={data}")
    assert status == [2]
    assert ranks.output(0).startswith(f"error: there is no token file {data}; make it with")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("train.learning_rate=1e30", "train.max_skipped=3"), "not finite in the last 3 steps (train.max_skipped)"),
        (("model.dim=1048576",), "this run does not fit into the memory of cpu"),
        (("model.dim=1048576", "train.ignore_plan=true"), "rank 0 is out of memory"),
        (("train.output_dir=/dev/null/run",), "/dev/null is no folder; use another folder"),
    ],
    ids=["divergence", "plan", "memory", "folder"],
)
def test_one_message_and_status_2(config, tmp_path, settings, message):
    status, ranks = train(tmp_path / "logs", 2, config, FOREVER, "parallel.data=2", *settings)
    assert status == [2, 2]
    assert message in ranks.errors(0)[0]
    for rank in range(2):
        assert "Traceback" not in ranks.output(rank)
        assert len(ranks.errors(rank)) == 1
    assert checkpoints(tmp_path / "run") == []


def test_skipped_steps_are_counted(config, tmp_path):
    """A learning rate that ends the numbers at once: every later step is skipped, counted and shown."""
    settings = ("train.learning_rate=1e30", "train.warmup_steps=0", "train.max_skipped=99", "train.checkpoint_every=4")
    status, ranks = train(tmp_path / "logs", 1, config, "train.steps=6", *settings)
    assert status == [0]
    assert "skipped" in ranks.output(0)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["loss"] is None for line in lines] == [False, *[True] * 5]
