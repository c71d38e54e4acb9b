"""The pictures of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[int, float]]


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_over_length(axes: Any, lines: Mapping[str, Points], xlabel: str, ylabel: str) -> None:
    """Times against lengths, both logarithmic; exact attention, called dense or exact, in dashes."""
    for label, points in lines.items():
        dashed = label.startswith(("dense", "exact"))
        axes.plot(*zip(*sorted(points), strict=True), "--" if dashed else "-", marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(frameon=False, fontsize=8)
