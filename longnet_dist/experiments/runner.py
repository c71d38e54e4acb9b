"""The runs of an experiment, one after the other; what is finished is not done again."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from longnet_dist.checkpoint.identity import flat
from longnet_dist.checkpoint.run_folder import RunFolder, write_text
from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.config.model import LongNetConfig
from longnet_dist.config.schema import Config
from longnet_dist.data.token_file import TokenFile
from longnet_dist.errors import ConfigError
from longnet_dist.estimate.model_cost import flops_per_token, num_parameters
from longnet_dist.experiments.kinds import KINDS, Kind
from longnet_dist.experiments.plan import Run
from longnet_dist.experiments.report import write_report
from longnet_dist.machine import cpu_name
from longnet_dist.telemetry.json_lines import read_jsonl


def run_all(
    runs: Sequence[Run],
    train: Callable[[Run], None],
    launch: LaunchEnvironment,
    is_late: Callable[[], bool] = lambda: False,
) -> bool:
    """Train and measure runs of one experiment, and write its report after each.

    Args:
        runs: in order; all are checked before the first begins.
        train: trains one run to its end, or goes on with it.
        launch: this process, which is alone.
        is_late: says whether nothing more may begin.

    Returns:
        whether all runs are finished.

    Raises:
        LongNetError: a setting that cannot be, or what ends any training or evaluation.
        SystemExit: from ``train``, if it was asked to stop. The same call goes on with the run.
    """
    kind = KINDS[runs[0].experiment.kind]
    finished = [is_finished(run) for run in runs]
    for run, done in zip(runs, finished, strict=True):
        if done:
            print(f"{run.experiment.name}: {run.key} is finished: {run.record}")
            continue
        if is_late():
            return False
        print(f"{run.experiment.name}: {run.key}", flush=True)
        if kind.trains:
            kind.prepare(run)
            if is_late():
                return False
            train(run)
        if is_late():
            return False
        _free_memory()
        measured = kind.measure(run, launch)
        run.record.parent.mkdir(parents=True, exist_ok=True)
        record = _facts(run, kind) | {"measured": measured}
        write_text(run.record, json.dumps(record, indent=1, allow_nan=False) + "\n")
        write_report(run.experiment, run.output)
    write_report(runs[0].experiment, runs[0].output)
    return True


def is_finished(run: Run) -> bool:
    """Say whether a run has been trained and measured.

    Raises:
        ConfigError: it has, with other settings.
    """
    if not run.record.exists():
        return False
    record = json.loads(run.record.read_text(encoding="utf-8"))
    there = {name: record.get(name) for name in run.identity}
    old, new = ({key: json.dumps(value) for key, value in flat(values)} for values in (there, run.identity))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed:
        values = (f"{key} is {new.get(key, 'not set')}, and was {old.get(key, 'not set')}" for key in changed)
        raise ConfigError(
            f"{run.record} is the result of other settings: {'; '.join(values)}; use another --output, or remove "
            f"{run.record} and {run.folder}"
        )
    return True


def _facts(run: Run, kind: type[Kind]) -> dict[str, Any]:
    """Return what a record says of its run beside what was measured."""
    model = run.config().model if kind.trains else LongNetConfig(**run.values["model"])
    facts = {
        "run": run.name,
        "series": run.plan.series or run.name,
        "seed": run.seed,
        "about": run.plan.about,
        "attention": model.attention,
        **run.identity,
        "environment": _environment(),
    }
    if not kind.trains:
        return facts
    config = RunFolder(run.folder).config()
    assert config.data.path is not None
    ranks = int(config.parallel.data) * int(config.parallel.sequence)  # resolved in a run's own file
    header, steps = TokenFile.open(config.data.path).header, read_jsonl(RunFolder(run.folder).metrics_file)
    return facts | {
        "parameters": num_parameters(model),
        "flops_per_token": _mean_flops(config),
        "tokens": config.train.steps * config.train.batch_size * config.data.sequence_length,
        "data": {"source": header.source, "tokens": header.num_tokens, "sha256": header.sha256},
        "device_minutes": sum(step["step_seconds"] for step in steps) * ranks / 60,
        "training_loss": steps[-1]["loss"] if steps else None,
    }


def _mean_flops(config: Config) -> float:
    """Return the FLOPs of a training token, the mean over all steps, whose sequences may grow."""
    lengths = Counter(config.length_of_step(step) for step in range(config.train.steps))
    return sum(count * flops_per_token(config.model, length) for length, count in lengths.items()) / config.train.steps


def _environment() -> dict[str, str | int]:
    facts: dict[str, str | int] = {"torch": torch.__version__, "cpu": cpu_name()}
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "gpus": 1}
    return facts


def _free_memory() -> None:
    """Give back what a training in this process leaves; its engine is part of reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.compiler.reset()
