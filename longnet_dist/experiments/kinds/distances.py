"""How many blocks information needs between any two tokens, by geometry alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.config.model import LongNetConfig
from longnet_dist.experiments.drawing import Series, draw_series, name_lengths
from longnet_dist.experiments.kinds import KINDS, Kind, Record, Settings, settings_of
from longnet_dist.experiments.plan import Experiment, Run
from longnet_dist.geometry.distance import block_distances
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.telemetry.plot_style import new_figure, short_length, spread_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class DistanceSettings(Settings):
    """Say what is counted.

    Attributes:
        lengths: tokens ``N`` of the sequences.
        limit: the most blocks to count.
        base, ratio: of ``DilatedPattern.geometric(base, N, ratio)``, whose branches replace those of the model; None:
            the model's.
    """

    lengths: tuple[int, ...]
    limit: int = 64
    base: int | None = None
    ratio: int = 2


@KINDS.register("distances")
class Distance(Kind):
    """Count, without a training."""

    trains = False

    @staticmethod
    def measure(run: Run, launch: LaunchEnvironment) -> dict[str, Any]:
        settings = settings_of(DistanceSettings, run.settings)
        points = []
        for length in settings.lengths:
            config = _model(run, settings, length)
            patterns = list(dict.fromkeys(config.layer_pattern(layer) for layer in range(config.layers)))
            if [config.layer_pattern(layer) for layer in range(config.layers)] != _repeated(patterns, config.layers):
                patterns = [config.layer_pattern(layer) for layer in range(config.layers)]
            for causal in (True, False):
                found = block_distances(patterns, length, config.kv_heads or config.heads, causal, settings.limit)
                values = {"tokens": length, "causal": causal, "worst": found.worst, "mean": found.mean}
                within = sum(found.within[-1:]) / found.pairs if found.pairs else 1.0
                never = found.never / found.pairs if found.pairs else 0.0
                points.append(values | {"counted": within, "never": never, "named": found.named()})
        return {"points": points, "limit": settings.limit}

    @staticmethod
    def table(experiment: Experiment, records: Sequence[Record]) -> list[list[str]]:
        rows = [["pattern", "tokens", "mask", "worst blocks", "mean blocks", "never connected", "for example"]]
        for record in records:
            for point in record["measured"]["points"]:
                over = f"> {record['measured']['limit']}"
                worst = over if point["worst"] is None else str(point["worst"])
                mean = "–" if point["mean"] is None else f"{point['mean']:.3f}"
                mask = "causal" if point["causal"] else "none"
                example = point["named"].split(";")[0]
                share = point["never"]
                never = f"1 − {1 - share:.2g}" if 0.999 < share < 1 else f"{share:.3g}"
                rows.append([record["run"], short_length(point["tokens"]), mask, worst, mean, never, example])
        return rows

    @staticmethod
    def draw(experiment: Experiment, records: Sequence[Record], subtitle: str) -> Figure:
        figure, panels = new_figure(experiment.title, subtitle, 2, 13, 5.4)
        for axes, what in zip(panels, ("mean", "worst"), strict=True):
            series, lengths = [], set()
            for record in records:
                points = [x for x in record["measured"]["points"] if x["causal"] and x[what] is not None]
                drawn = [(float(x["tokens"]), float(x[what]), None) for x in points]
                lengths |= {x["tokens"] for x in points}
                if drawn:
                    series.append(Series(record["run"], record["attention"], drawn))
            draw_series(figure, axes, series, "tokens in one sequence", f"{what} blocks, causal")
            name_lengths(axes, spread_ticks(lengths))
        return figure


def _model(run: Run, settings: DistanceSettings, length: int) -> LongNetConfig:
    """Return the model of a run for sequences of a length."""
    fields = dict(run.values["model"])
    if settings.base is not None:
        pattern = DilatedPattern.geometric(settings.base, length, settings.ratio)
        fields |= {"segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates}
    return LongNetConfig(**fields)


def _repeated(patterns: Sequence[DilatedPattern], layers: int) -> list[DilatedPattern]:
    return [patterns[layer % len(patterns)] for layer in range(layers)]
