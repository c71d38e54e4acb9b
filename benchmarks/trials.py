"""One measurement of training in a process of its own, so that neither its memory nor its failure spoils the next."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.dense import make_dense
from benchmarks.jobs import model_flops
from benchmarks.runs import import_paths
from longnet_dist import LongNet
from longnet_dist.comm.launch_env import LaunchEnvironment, process_group
from longnet_dist.config.loading import load_config
from longnet_dist.config.schema import Config
from longnet_dist.data.batches import Batches
from longnet_dist.data.token_file import TokenFile
from longnet_dist.engine.execution import Execution
from longnet_dist.estimate.devices import device_of
from longnet_dist.optim.schedules import learning_rate
from longnet_dist.train.allocator import prepare_allocator
from longnet_dist.train.batch_prefetch import StepsAhead, pinned
from longnet_dist.train.deepspeed_engine import build_engine, prepare_deepspeed
from longnet_dist.train.step import MicroBatch, train_step

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "configs" / "paper.yaml"
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Trial:
    """Some training steps on one device.

    Attributes:
        name: what is measured.
        rows: of a sequence.
        data: a token file.
        settings: ``key=value`` over ``configs/paper.yaml`` with one sequence a step; the last of a key counts.
        dense: whether attention is full.
        warmup: steps that are not measured.
        steps: steps that are.
    """

    name: str
    rows: int
    data: str
    settings: tuple[str, ...] = ()
    dense: bool = False
    warmup: int = 3
    steps: int = 5

    @property
    def key(self) -> dict[str, Any]:
        """What makes two trials the same."""
        return {"name": self.name, "rows": self.rows, "settings": list(self.settings), "dense": self.dense}

    def config(self) -> Config:
        """The run whose steps they are."""
        fixed = (f"data.sequence_length={self.rows}", "train.batch_size=1", "train.micro_batch_size=1")
        words = dict(word.split("=", 1) for word in (*fixed, *self.settings))
        return load_config(BASE, [f"{key}={value}" for key, value in words.items()])


def isolated(trial: Trial, seconds: float) -> dict[str, Any]:
    """The result of :func:`measure` in a new process, or ``error``: what went wrong, or that time was up."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.trials", json.dumps(asdict(trial)), str(answer)]
        environment = os.environ | {"PYTHONPATH": import_paths()}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {seconds:.0f} s"}
        if answer.exists():
            result: dict[str, Any] = json.loads(answer.read_text())
            return result
        said = done.stderr.strip()
        if "out of memory" in said.lower() or done.returncode == -9:
            return {"error": OUT_OF_MEMORY}
        return {"error": f"status {done.returncode}", "said": said[-1500:]}


def measure(trial: Trial, device: torch.device) -> dict[str, Any]:
    """Do the steps; torch.distributed must be up, with one rank.

    Returns:
        Seconds, losses and norms of gradients of the steps, tokens a second and MFU of their median, and peaks of
        memory.
    """
    config = trial.config()
    train, precision = config.train, config.precision(device.type)
    torch.manual_seed(train.seed)
    with device:
        model = LongNet(config.model, execution=Execution.of(train, device.type))
    engine = build_engine(make_dense(model) if trial.dense else model, config, precision, train.batch_size, 1)
    vocab, rows = config.model.vocab_size, trial.rows
    batches = Batches(TokenFile.open(trial.data), "train", rows, train.batch_size, train.seed, vocab_size=vocab)
    seconds, results, steps = [], [], trial.warmup + trial.steps
    ahead = StepsAhead(lambda step: pinned(batches.local(step), device), steps)
    for step in range(steps):
        began = time.perf_counter()
        labels = partial(batches.num_labels, step, 0, 1)
        read = ahead.of(step)
        micro_batches = [MicroBatch(lambda _, rows=read: rows, labels)]  # type: ignore[misc]
        # Reading the loss waits for the device.
        results.append(train_step(engine, micro_batches, rows, rows, learning_rate(step + 1, train)))
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[trial.warmup :])
    flops = train.batch_size * model_flops(config.model, rows, trains=True, dense=trial.dense)
    peak = device_of(device).peak_tflops
    return {
        "seconds": seconds,
        "median_seconds": median,
        "tokens_per_second": train.batch_size * rows / median,
        "mfu": peak and flops / median / peak / 1e12,
        "losses": [result.loss for result in results],
        "gradient_norms": [str(result.grad_norm) for result in results],  # JSON has no infinity
        "precision": precision,
        **_memory(device),
    }


def _memory(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def main() -> None:
    """What :func:`isolated` starts: a trial as JSON, and the file for the answer."""
    fields = json.loads(sys.argv[1])
    trial = Trial(**{**fields, "settings": tuple(fields["settings"])})
    prepare_allocator(os.environ)
    launch = LaunchEnvironment()
    device = launch.device()
    prepare_deepspeed(launch, device)
    with process_group(launch, device, timedelta(minutes=10)):
        answer = measure(trial, device)
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
