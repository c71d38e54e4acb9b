"""Pictures of experiments, in the style of all pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longnet_dist.telemetry.plot_style import (
    DILATED,
    FULL,
    IDEAL,
    MARKERS,
    SPARSE,
    WINDOW,
    label_ends,
    short_length,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"dilated": DILATED, "full": FULL, "sparse": SPARSE, "window": WINDOW}
STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Series:
    """A Series is one line of a picture.

    Attributes:
        label: what stands at its end.
        kind: of attention, which gives the colour.
        points: x, y and the spread of y over seeds, None with one seed.
    """

    label: str
    kind: str
    points: Sequence[tuple[float, float, float | None]]


def draw_series(figure: Figure, axes: Any, series: Sequence[Series], xlabel: str, ylabel: str) -> None:
    """Draw lines over a logarithmic y, with error bars and a label at each end; a series of one point is a level.

    Args:
        figure: of the axes.
        axes: of matplotlib.
        series: the lines.
        xlabel: the quantity and its unit.
        ylabel: the quantity and its unit.
    """
    labels, seen = [], dict.fromkeys(COLORS, 0)
    lines = [one for one in series if len(one.points) > 1] or series
    places = [x for one in lines for x, _, _ in one.points]
    nearest, furthest = min(places), max(places)
    if nearest == furthest:
        nearest = furthest / 2
    logarithmic = nearest > 0
    for one in series:
        number, color = seen.get(one.kind, 0), COLORS.get(one.kind, IDEAL)
        seen[one.kind] = number + 1
        points = sorted(one.points)
        x, y, spread = zip(*points, strict=True)
        if len(points) == 1:
            axes.hlines(y[0], nearest, furthest, color=color, linestyle=":", lw=1.4)
        else:
            bars = [value or 0.0 for value in spread] if any(spread) else None
            style = {"marker": MARKERS[number % len(MARKERS)], "linestyle": STYLES[number % len(STYLES)]}
            axes.errorbar(x, y, bars, color=color, capsize=3, markersize=4.5, **style)
        labels.append((one.label, (x[-1] if len(points) > 1 else furthest, y[-1]), color))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if logarithmic:
        axes.set_xscale("log")
        left, right = axes.get_xlim()
        axes.set_xlim(left, right * (right / left) ** 0.45)
    else:
        left, right = axes.get_xlim()
        axes.set_xlim(left, right + 0.45 * (right - left))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:,.4g}")
    label_ends(figure, axes, labels)


def name_lengths(axes: Any, lengths: Sequence[int]) -> None:
    """Put ticks at lengths, written as "8K"."""
    axes.set_xticks(sorted(set(lengths)))
    axes.xaxis.set_major_formatter(lambda tokens, _: short_length(tokens))
    axes.xaxis.set_minor_locator(_no_ticks())


def draw_heat_map(axes: Any, lengths: Sequence[int], depths: Sequence[float], shares: Sequence[Sequence[float]]) -> Any:
    """Draw shares from 0 to 1 by length and depth, each with its percentage.

    Args:
        axes: of matplotlib.
        lengths: of the columns, tokens.
        depths: of the rows, 0 on top.
        shares: ``[depth][length]``; NaN where nothing was measured.
    """
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.grid(visible=False)
    axes.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            if not math.isnan(share):
                color = "white" if share > 0.6 else "0.2"
                axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=7.5, color=color)
    return image


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
