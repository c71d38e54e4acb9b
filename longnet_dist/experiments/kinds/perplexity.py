"""The perplexity of held-out text at several context lengths, of one checkpoint of a run or of several."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longnet_dist.checkpoint.format import checkpoint_folder
from longnet_dist.checkpoint.run_folder import RunFolder
from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.errors import ConfigError
from longnet_dist.experiments.drawing import COLORS, Series, draw_series, name_lengths
from longnet_dist.experiments.kinds import KINDS, Kind, Record, Settings, by_run, settings_of, value_of
from longnet_dist.experiments.plan import Experiment, Run
from longnet_dist.inference.runs import evaluate_run
from longnet_dist.telemetry.plot_style import draw_bars, new_figure, short_length

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PerplexitySettings(Settings):
    """Say what is evaluated.

    Attributes:
        contexts: tokens of the windows into which the text is cut.
        tokens: tokens to predict, the first of the validation split.
        over: what the picture shows: the perplexity over contexts, training FLOPs, parameters or training tokens, or a
            bar for each run.
        at: the context of the picture, where it does not show all; the longest if not given.
        checkpoints: training tokens after which a run is evaluated, multiples of a step; 0: the weights that it began
            with. If not given, at its end.
    """

    contexts: tuple[int, ...]
    tokens: int
    over: Literal["context", "flops", "parameters", "tokens", "run"] = "context"
    at: int | None = None
    checkpoints: tuple[int, ...] = ()

    @property
    def shown(self) -> int:
        """Return the context of the picture."""
        return self.at or max(self.contexts)


@KINDS.register("perplexity")
class Perplexity(Kind):
    """Evaluate with the ordinary evaluation."""

    @staticmethod
    def measure(run: Run, launch: LaunchEnvironment) -> dict[str, Any]:
        settings = settings_of(PerplexitySettings, run.settings)
        data = RunFolder(run.folder).config().data.path
        assert data is not None
        points = []
        for tokens, folder, changes in _checkpoints(run, settings):
            found = evaluate_run(folder, data, settings.contexts, settings.tokens, "validation", launch, changes)
            values = {str(context): {"loss": x.loss, "perplexity": x.perplexity} for context, x in found.items()}
            points.append({"tokens": tokens, "contexts": values})
        return {"points": points}

    @staticmethod
    def table(experiment: Experiment, records: Sequence[Record]) -> list[list[str]]:
        contexts = _contexts(records)
        names = [f"perplexity at {short_length(context)}" for context in contexts]
        rows = [["run", "parameters", "training tokens", "GFLOPs a token", *names]]
        for name, same in by_run(records).items():
            for place, point in enumerate(same[0]["measured"]["points"]):
                values = [str(value_of(same, partial(_read, place=place, context=c))) for c in contexts]
                facts = [f"{same[0]['parameters'] / 1e6:.4g}M", f"{point['tokens']:,}"]
                rows.append([name, *facts, f"{same[0]['flops_per_token'] / 1e9:.4g}", *values])
        return rows

    @staticmethod
    def draw(experiment: Experiment, records: Sequence[Record], subtitle: str) -> Figure:
        settings = settings_of(PerplexitySettings, experiment.settings)
        figure, (axes,) = new_figure(experiment.title, subtitle, width=9)
        runs = by_run(records)
        if settings.over == "run":
            values = {name: value_of(same, lambda x: _read(x, -1, _shown(x))) for name, same in runs.items()}
            bars = [(name, value.mean, COLORS[runs[name][0]["attention"]]) for name, value in values.items()]
            texts = [str(value) for value in values.values()]
            draw_bars(axes, bars, _ylabel(records), texts)
            return figure
        xlabel = {
            "context": "tokens of context",
            "flops": "training FLOPs",
            "parameters": "parameters",
            "tokens": "training tokens",
        }[settings.over]
        ylabel = "perplexity" if settings.over == "context" else _ylabel(records)
        draw_series(figure, axes, _series(settings.over, runs), xlabel, ylabel)
        if settings.over == "context":
            name_lengths(axes, _contexts(records))
        return figure


def _checkpoints(run: Run, settings: PerplexitySettings) -> list[tuple[int, Path, dict[str, Any]]]:
    """Return training tokens, folder and changed fields of the model of each checkpoint to evaluate."""
    config = run.config()
    step_tokens = config.train.batch_size * config.data.sequence_length
    found: list[tuple[int, Path, dict[str, Any]]] = []
    for tokens in settings.checkpoints or (config.train.steps * step_tokens,):
        step, rest = divmod(tokens, step_tokens)
        if rest or step > config.train.steps or (step == 0 and run.init_folder is None):
            raise ConfigError(
                f"the run {run.name} cannot be evaluated after {tokens:,} tokens: a step has {step_tokens:,} tokens "
                f"and it makes {config.train.steps}; use multiples of a step, and 0 only for a run with init"
            )
        if step:
            found.append((tokens, checkpoint_folder(run.folder, step), {}))
        else:
            assert run.init_folder is not None
            found.append((0, run.init_folder, config.model.model_dump()))
    return found


def _read(record: Record, place: int, context: int) -> float | None:
    """Return the perplexity of a record at one of its checkpoints and a context."""
    points = record["measured"]["points"]
    if not -len(points) <= place < len(points):
        return None
    found = points[place]["contexts"].get(str(context))
    return None if found is None else found["perplexity"]


def _settings(record: Record) -> PerplexitySettings:
    return settings_of(PerplexitySettings, record["settings"])


def _shown(record: Record) -> int:
    return _settings(record).shown


def _contexts(records: Sequence[Record]) -> list[int]:
    """Return the contexts at which any run was evaluated."""
    return sorted({context for record in records for context in _settings(record).contexts})


def _ylabel(records: Sequence[Record]) -> str:
    shown = {_shown(record) for record in records}
    return f"perplexity at {short_length(shown.pop())}" if len(shown) == 1 else "perplexity at the context of training"


def _series(over: str, runs: dict[str, list[Record]]) -> list[Series]:
    """Return the lines of the picture: a run's contexts or checkpoints, or the runs of a series."""
    lines: dict[str, Series] = {}
    for name, same in runs.items():
        first = same[0]
        if over == "context":
            places = [(float(context), -1, context) for context in _settings(first).contexts]
        elif over == "tokens":
            points = first["measured"]["points"]
            places = [(float(point["tokens"]), place, _shown(first)) for place, point in enumerate(points)]
        else:
            total = first["flops_per_token"] * first["tokens"]
            places = [(total if over == "flops" else float(first["parameters"]), -1, _shown(first))]
        label = name if over in ("context", "tokens") else first["series"]
        drawn = [(x, value_of(same, partial(_read, place=p, context=c))) for x, p, c in places]
        earlier = lines[label].points if label in lines else ()
        lines[label] = Series(label, first["attention"], [*earlier, *((x, y.mean, y.spread) for x, y in drawn)])
    if over not in ("flops", "parameters"):
        return list(lines.values())
    return [replace(line, label=line.label + _power(line)) for line in lines.values()]


def _power(line: Series) -> str:
    """Return the power with which the loss falls over x, by least squares on logarithms; empty under three points."""
    if len(line.points) < 3:
        return ""
    x, y, _ = zip(*line.points, strict=True)
    slope = statistics.linear_regression([math.log(value) for value in x], [math.log(math.log(value)) for value in y])[
        0
    ]
    return f" (loss ~ x^{slope:.3f})"
