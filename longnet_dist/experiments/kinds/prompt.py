"""Perplexity by position in a window, and of the same tokens behind prompts of several lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from longnet_dist.checkpoint.run_folder import RunFolder
from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.data.batches import Windows
from longnet_dist.experiments.drawing import Series, draw_series, name_lengths
from longnet_dist.experiments.kinds import KINDS, Kind, Record, Settings, by_run, settings_of, value_of
from longnet_dist.experiments.plan import Experiment, Run
from longnet_dist.inference.losses_by_position import losses_after_prompts, losses_by_position
from longnet_dist.inference.runs import measure_run
from longnet_dist.model.longnet import LongNet
from longnet_dist.telemetry.plot_style import IDEAL, new_figure, short_length

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PromptSettings(Settings):
    """Say what is measured.

    Attributes:
        edges: positions in a window, ascending from 0, between which losses are averaged.
        prompts: numbers of tokens before those that are predicted.
        asked: tokens that are predicted behind each prompt, the same behind all.
        windows: windows of the validation split.
    """

    edges: tuple[int, ...]
    prompts: tuple[int, ...]
    asked: int
    windows: int

    @property
    def length(self) -> int:
        """Return the tokens of a window."""
        return max(self.edges[-1], max(self.prompts) + self.asked - 1)


@KINDS.register("prompt")
class Prompt(Kind):
    """Measure losses of parts of windows."""

    @staticmethod
    def measure(run: Run, launch: LaunchEnvironment) -> dict[str, Any]:
        settings = settings_of(PromptSettings, run.settings)

        def losses(model: LongNet, windows: Windows | None, device: torch.device) -> dict[str, Any]:
            assert windows is not None
            behind = losses_after_prompts(model, windows, settings.prompts, settings.asked, settings.windows, device)
            at = losses_by_position(model, windows, settings.edges, settings.windows, device)
            return {
                "trained": RunFolder(run.folder).config().data.sequence_length,
                "positions": [[*part, loss] for part, loss in zip(pairwise(settings.edges), at, strict=True)],
                "prompts": [[prompt, loss] for prompt, loss in zip(settings.prompts, behind, strict=True)],
            }

        return measure_run(run.folder, RunFolder(run.folder).config().data.path, settings.length, launch, losses)

    @staticmethod
    def table(experiment: Experiment, records: Sequence[Record]) -> list[list[str]]:
        settings = settings_of(PromptSettings, experiment.settings)
        parts = [f"{short_length(start)}–{short_length(stop)}" for start, stop in pairwise(settings.edges)]
        prompts = [f"prompt of {short_length(prompt)}" for prompt in settings.prompts]
        rows = [["run", "trained at", *(f"positions {part}" for part in parts), *prompts]]
        for name, same in by_run(records).items():
            cells = [str(value_of(same, partial(_perplexity, what="positions", place=p))) for p in range(len(parts))]
            cells += [str(value_of(same, partial(_perplexity, what="prompts", place=p))) for p in range(len(prompts))]
            rows.append([name, short_length(same[0]["measured"]["trained"]), *cells])
        return rows

    @staticmethod
    def draw(experiment: Experiment, records: Sequence[Record], subtitle: str) -> Figure:
        settings, runs = settings_of(PromptSettings, experiment.settings), by_run(records)
        figure, (left, right) = new_figure(experiment.title, subtitle, 2, 13, 5.2)
        panels = (
            (left, "positions", settings.edges[1:], "position in the window, tokens"),
            (right, "prompts", settings.prompts, "tokens of the prompt"),
        )
        for axes, what, lengths, xlabel in panels:
            series = []
            for name, same in runs.items():
                values = [value_of(same, partial(_perplexity, what=what, place=p)) for p in range(len(lengths))]
                points = [(float(x), y.mean, y.spread) for x, y in zip(lengths, values, strict=True)]
                series.append(Series(name, same[0]["attention"], points))
            draw_series(figure, axes, series, xlabel, "perplexity")
            name_lengths(axes, lengths)
            for trained in {record["measured"]["trained"] for record in records}:
                axes.axvline(trained, color=IDEAL, linestyle=":", lw=1.2)
        return figure


def _perplexity(record: Record, what: str, place: int) -> float:
    return math.exp(min(record["measured"][what][place][-1], 700.0))
