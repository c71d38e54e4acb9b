"""Retrieval: models are trained on generated tasks and tested by length and depth, streamed for long texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longnet_dist.checkpoint.run_folder import write_text
from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.data.batches import Windows
from longnet_dist.data.tasks import write_samples
from longnet_dist.experiments.drawing import draw_heat_map
from longnet_dist.experiments.kinds import KINDS, Kind, Record, Settings, by_run, settings_of, value_of
from longnet_dist.experiments.plan import Experiment, Run
from longnet_dist.inference.retrieval import Retrieval, evaluate_retrieval, grid_of
from longnet_dist.inference.runs import measure_run
from longnet_dist.model.longnet import LongNet
from longnet_dist.telemetry.plot_style import new_figure, short_length

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RetrievalSettings(Settings):
    """Say what is trained on and tested.

    Attributes:
        tasks: names of tasks of ``data/tasks``.
        training_windows: windows of the token file that runs are trained on, each as long as the sequences of a run.
        shortest: fewest tokens of a sample in them; a window has 1, 2, 4, … samples. None: it is one sample.
        lengths: tokens of the samples for tests.
        depths: where the model must look, from 0 (the beginning) to 1 (just before the question).
        samples: samples of each task, length and depth.
        most_tokens: tokens of all these samples together, which limits their number at long lengths, down to one.
        chunk: tokens that are computed at once.
    """

    tasks: tuple[str, ...]
    training_windows: int
    shortest: int | None = None
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    most_tokens: int = 2**62
    chunk: int = 65536


@KINDS.register("retrieval_tasks")
class RetrievalTasks(Kind):
    """Train on tasks, and test on other samples of them."""

    @staticmethod
    def prepare(run: Run) -> None:
        """Write the token file of tasks, which runs of one length and number of windows share."""
        settings = settings_of(RetrievalSettings, run.settings)
        length = run.config().data.sequence_length
        folder = run.experiment.folder(run.output) / "data"
        names = "-".join(settings.tasks)
        sizes = f"{settings.shortest or length}-{length}x{settings.training_windows}"
        path = folder / f"{names}-{sizes}.tokens"
        if not path.exists():
            write_samples(path, settings.tasks, length, settings.training_windows, shortest=settings.shortest)
        run.data = path

    @staticmethod
    def measure(run: Run, launch: LaunchEnvironment) -> dict[str, Any]:
        settings = settings_of(RetrievalSettings, run.settings)

        def solve(model: LongNet, windows: Windows | None, device: torch.device) -> list[dict[str, Any]]:
            places = [(t, n, d) for t in settings.tasks for n in settings.lengths for d in settings.depths]
            numbers = [max(1, min(settings.samples, settings.most_tokens // length)) for _, length, _ in places]
            found = _measured_before(partial_file, run.identity)
            for place, number in list(zip(places, numbers, strict=True))[len(found) :]:
                found.append(asdict(evaluate_retrieval(model, *place, number, settings.chunk, device)))
                write_text(partial_file, json.dumps({"identity": run.identity, "results": found}))
            return found

        # Long texts take minutes, so an interrupted measurement goes on where it was.
        partial_file = run.record.with_suffix(".partial")
        partial_file.parent.mkdir(parents=True, exist_ok=True)
        results = measure_run(run.folder, None, 1, launch, solve)
        partial_file.unlink(missing_ok=True)
        return {"results": results}

    @staticmethod
    def table(experiment: Experiment, records: Sequence[Record]) -> list[list[str]]:
        lengths = sorted({x["length"] for record in records for x in record["measured"]["results"]})
        rows = [["run", "task", *(f"solved at {short_length(length)}" for length in lengths)]]
        for name, same in by_run(records).items():
            for task in dict.fromkeys(x["task"] for x in same[0]["measured"]["results"]):
                values = [value_of(same, partial(_share, task=task, length=n)) for n in lengths]
                rows.append([name, task, *map(str, values)])
        return rows

    @staticmethod
    def draw(experiment: Experiment, records: Sequence[Record], subtitle: str) -> Figure:
        runs = by_run(records)
        tasks = list(dict.fromkeys(x["task"] for record in records for x in record["measured"]["results"]))
        size = {"width": max(6.0, 3.6 * len(runs)), "height": 1.4 + 2.6 * len(tasks)}
        figure, axes = new_figure(f"{experiment.title}", subtitle, len(runs), rows=len(tasks), **size)
        for place, (task, (name, same)) in enumerate((t, run) for t in tasks for run in runs.items()):
            results = [Retrieval(**x) for record in same for x in record["measured"]["results"] if x["task"] == task]
            lengths, depths, grid = grid_of(_joined(results))
            draw_heat_map(axes[place], lengths, depths, grid)
            axes[place].set_title(f"{name}: {task}", fontsize=9)
            if place % len(runs) == 0:
                axes[place].set_ylabel("depth of what is asked")
            if place >= len(runs) * (len(tasks) - 1):
                axes[place].set_xlabel("tokens of the text")
        return figure


def _measured_before(file: Path, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results of an interrupted measurement of a run with the same identity."""
    if not file.exists():
        return []
    partial = json.loads(file.read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = partial["results"] if partial.get("identity") == identity else []
    return found


def _share(record: Record, task: str, length: int) -> float | None:
    """Return the share of a task's samples of a length, at all depths, that were solved; None if not measured."""
    found = [x for x in record["measured"]["results"] if (x["task"], x["length"]) == (task, length)]
    return sum(x["solved"] for x in found) / sum(x["samples"] for x in found) if found else None


def _joined(results: Sequence[Retrieval]) -> list[Retrieval]:
    """Return the results of all seeds as one for each length and depth."""
    places: dict[tuple[int, float], list[Retrieval]] = {}
    for result in results:
        places.setdefault((result.length, result.depth), []).append(result)
    return [
        Retrieval(
            same[0].task,
            length,
            depth,
            sum(x.samples for x in same),
            sum(x.solved for x in same),
            sum(x.tokens_right for x in same) / len(same),
        )
        for (length, depth), same in places.items()
    ]
