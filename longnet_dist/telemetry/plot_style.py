"""All pictures share one style: the same colour for the same thing, lengths as "1M", labels beside their lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DILATED = "#1b6ca8"
FULL = "#c8482c"
SPARSE = "#2a8f5b"
WINDOW = "#8a5fb5"
IDEAL = "#8a8f98"
MARKERS = ("o", "s", "D", "^")
LABEL_GAP = 11.0  # points between two labels
UNITS = ((30, "B"), (20, "M"), (10, "K"))


@dataclass(frozen=True)
class Line:
    """One line of a picture over sequence length.

    Attributes:
        label: what stands at its end.
        points: (tokens, value), at least two.
        color: one of the colours above.
        dashed: whether it is a training step, where a forward is drawn, too.
        marker: one for each machine.
    """

    label: str
    points: Sequence[tuple[int, float]]
    color: str = DILATED
    dashed: bool = False
    marker: str = "o"

    def __post_init__(self) -> None:
        if len(self.points) < 2:
            raise ValueError(f"a line has two points or more, but {self.label!r} has {len(self.points)}: use a bar")


def short_length(tokens: float) -> str:
    """Write a length as "8K", "1M" or "1B" (2^30) where that is exact, else in full."""
    for power, unit in UNITS:
        if tokens >= 1 << power and tokens % (1 << power) == 0:
            return f"{int(tokens) >> power}{unit}"
    return f"{int(tokens):,}"


def hardware(environment: dict[str, Any], gpus: int | None = None, *more: str) -> str:
    """Name the machine and versions of a result, in one line under the title."""
    name = str(environment.get("gpu", environment["cpu"])).removesuffix(" HBM3")
    count = environment.get("gpus", 1) if gpus is None else gpus
    machine = f"{count} × {name}" if "gpu" in environment else name
    return " · ".join([machine, f"torch {environment['torch']}", *more])


def new_figure(
    title: str, subtitle: str, panels: int = 1, width: float = 8.0, height: float = 5.0, rows: int = 1
) -> tuple[Figure, list[Any]]:
    """Make a figure that needs no screen.

    Args:
        title: what is shown.
        subtitle: hardware and versions, for which :func:`hardware` is there.
        panels: axes side by side, in each row.
        width: inches.
        height: inches.
        rows: rows of axes.

    Returns:
        The figure, and a list of its axes, row by row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n", fontsize=13, fontweight="bold")
    figure.text(0.5, 1 - 0.43 / height, subtitle, ha="center", va="center", fontsize=9, color="0.35")
    axes: list[Any] = figure.subplots(rows, panels, squeeze=False).flatten().tolist()
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
        each.set_axisbelow(True)
    return figure, axes


def draw_over_length(axes: Any, lines: Sequence[Line], ylabel: str, ticks: Sequence[int] | None = None) -> None:
    """Draw lines over sequence length, both logarithmic, each with its label at its right end.

    Args:
        axes: of matplotlib.
        lines: what is drawn.
        ylabel: the quantity and its unit.
        ticks: lengths with a label; by default those of the lines that are far enough apart.
    """
    from matplotlib.ticker import LogLocator

    for line in lines:
        style = {"color": line.color, "linestyle": "--" if line.dashed else "-"}
        axes.plot(*zip(*sorted(line.points), strict=True), marker=line.marker, markersize=4.5, **style)
    axes.set(xscale="log", yscale="log", xlabel="tokens in one sequence", ylabel=ylabel)
    axes.set_xticks(ticks or spread_ticks({tokens for line in lines for tokens, _ in line.points}))
    axes.xaxis.set_major_formatter(lambda tokens, _: short_length(tokens))
    values = [value for line in lines for _, value in line.points]
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 500 * min(values) else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.minorticks_off()


def draw_ideal(axes: Any, points: Sequence[tuple[float, float]], label: str, below: bool = False) -> None:
    """Draw what perfect scaling would give, dotted and grey, with its label at one end.

    Args:
        axes: of matplotlib.
        points: of the line, from left to right.
        label: what stands at it.
        below: put the label below the left end instead of above the right one.
    """
    axes.plot(*zip(*points, strict=True), ":", color=IDEAL, lw=1.6, zorder=1)
    point, offset, ha, va = (points[0], (2, -5), "left", "top") if below else (points[-1], (-3, 5), "right", "bottom")
    axes.annotate(label, point, offset, textcoords="offset points", color=IDEAL, fontsize=8, ha=ha, va=va)


def label_ends(figure: Figure, axes: Any, labels: Iterable[tuple[str, tuple[float, float], str]]) -> None:
    """Write labels to the right of points, moved up or down where they would touch.

    Args:
        figure: of the axes.
        axes: whose limits are final.
        labels: text, the point and the colour of each.
    """
    figure.draw_without_rendering()
    points_a_pixel = 72 / figure.dpi
    placed: list[tuple[float, float]] = []  # right end of the line and height of the text, points
    for text, point, color in sorted(labels, key=lambda label: label[1][1]):
        x, y = (value * points_a_pixel for value in axes.transData.transform(point))
        height = y
        for other_x, other in placed:
            if abs(other_x - x) < 130 and height < other + LABEL_GAP:
                height = other + LABEL_GAP
        placed.append((x, height))
        offset = (7, height - y)
        axes.annotate(text, point, offset, textcoords="offset points", color=color, fontsize=8.5, va="center")


def label_lines(figure: Figure, axes: Any, lines: Iterable[Line], room: float = 0.3) -> None:
    """Write each line's label at its right end.

    Args:
        figure: of the axes.
        axes: where the lines are.
        lines: as drawn.
        room: for labels, as a share of the width of the axes, which a logarithmic scale gets.
    """
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** (room / (1 - room)))
    label_ends(figure, axes, [(line.label, max(line.points), line.color) for line in lines])


def draw_bars(axes: Any, bars: Sequence[tuple[str, float, str]], xlabel: str, text: Sequence[str] = ()) -> None:
    """Draw horizontal bars, the first on top, with the value at each end.

    Args:
        axes: of matplotlib.
        bars: name, value and colour of each.
        xlabel: the quantity and its unit.
        text: what stands at each end instead of the value.
    """
    names, values, colors = zip(*bars, strict=True)
    drawn = axes.barh(range(len(bars)), values, color=colors, height=0.68)
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(xlabel)
    axes.margins(x=0.2)
    axes.bar_label(drawn, text or [f"{value:,.3g}" for value in values], padding=4, fontsize=8.5)


def spread_ticks(lengths: Iterable[int], factor: int = 8) -> list[int]:
    """Choose lengths from the longest down, each at least ``factor`` times shorter than the one before."""
    chosen: list[int] = []
    for length in sorted(lengths, reverse=True):
        if not chosen or length * factor <= chosen[-1]:
            chosen.append(length)
    return chosen[::-1]


def save(figure: Figure, path: Any) -> None:
    """Write a picture, PNG or SVG by its name."""
    figure.savefig(path, dpi=140)
