"""Draw every committed picture from the committed JSON; nothing is measured.

    python benchmarks/pictures.py [--output FOLDER]

Each benchmark draws its own picture with the function of this module that has its name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from longnet_dist.telemetry.plot_style import (
    DILATED,
    FULL,
    IDEAL,
    MARKERS,
    Line,
    draw_bars,
    draw_ideal,
    draw_over_length,
    hardware,
    label_ends,
    label_lines,
    new_figure,
    save,
    short_length,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
MODES = {
    "forward": "forward",
    "train": "training step",
    "dense": "full attention, forward",
    "dense-train": "full attention, training step",
}
Result = Mapping[str, Any]


def attention(document: Result) -> Figure | None:
    """Bars of the rate of each case, and on each the rate of full attention."""
    cases = document.get("results")
    if not cases:
        return None
    facts = hardware(document["environment"], 1, "bf16", "forward + backward")
    figure, (axes,) = new_figure("Rate of dilated attention on one GPU", facts, height=1.8 + 0.42 * len(cases), width=9)
    bars = [(case["case"]["name"], case["both_tflops"], DILATED) for case in cases]
    shares = [f"{case['both_tflops']:.0f}  ({case['share_of_dense']:.2f} ×)" for case in cases]
    draw_bars(axes, bars, "TFLOP/s of the pattern's pairs (and × the rate of full attention)", shares)
    for place, case in enumerate(cases):
        axes.plot([case["dense_tflops"]] * 2, [place - 0.34, place + 0.34], color=FULL, lw=2.5)
    end = cases[0]["dense_tflops"], -0.34
    note = "fastest kernel of full attention, sequences of 2,048"
    axes.annotate(note, end, (0, 3), textcoords="offset points", color=FULL, fontsize=8.5, ha="center", va="bottom")
    axes.set_ylim(len(cases) - 0.5, -0.95)
    return figure


def billion(results: Sequence[Result]) -> Figure | None:
    """Seconds, and nanoseconds a token, over tokens: Figure 5 of the paper. A marker for each machine."""
    seconds, a_token = _lines_of(results, a_token=False), _lines_of(results, a_token=True)
    if not seconds:
        return None
    longest = max(tokens for line in seconds for tokens, _ in line.points)
    versions = sorted({f"torch {result['environment']['torch']}" for result in results})
    facts = " · ".join([*map(_machine, results), *versions, _model(results)])
    figure, (left, right) = new_figure(f"One sequence of up to {short_length(longest)} tokens", facts, 2, 13, 5.4)
    draw_over_length(left, seconds, "seconds")
    left.legend(left.get_lines(), [line.label for line in seconds], frameon=False, fontsize=8.5)
    _draw_same_time(left, seconds, a_token=False)
    draw_over_length(right, a_token, "nanoseconds a token")
    _draw_same_time(right, a_token, a_token=True)
    label_lines(figure, right, a_token)
    return figure


def token_time(results: Sequence[Result]) -> Figure | None:
    """Nanoseconds a token of a forward over tokens, dilated and full: the picture of README."""
    lines = _lines_of(results, a_token=True, modes={"forward": "dilated attention", "dense": "full attention"})
    if not lines:
        return None
    facts = f"{' and '.join(map(_machine, results))} · {_model(results)}, forward with loss"
    figure, (axes,) = new_figure("Time a token does not grow with the sequence", facts, width=8.4, height=4.4)
    draw_over_length(axes, lines, "nanoseconds a token")
    _draw_same_time(axes, lines, a_token=True)
    label_lines(figure, axes, lines, 0.24)
    return figure


def scaling(result: Result) -> Figure | None:
    """Time over GPUs where each has as many tokens, speed-up where all share them, and full attention if measured."""
    measured = [case for case in result.get("cases", []) if "ms" in case["overlapped"]]
    cases = {(case["rows"], case["gpus"]): case["overlapped"]["ms"] for case in measured}
    weak, strong = _weak(cases), _strong(cases)
    peers = [
        (peer["name"], peer["rows"], peer["exact"]["ms"]) for peer in result.get("peers", []) if "ms" in peer["exact"]
    ]
    shape, counts = result["shape"], sorted({gpus for _, gpus in cases})
    heads = f"{shape['heads']} head{'s' * (shape['heads'] > 1)} of {shape['dim']}"
    facts = hardware(result["environment"], max(counts), "bf16", heads, "causal, forward + backward")
    panels = [part for part, there in (("weak", weak), ("strong", strong), ("peers", peers)) if there]
    if not panels:
        return None
    title = "Dilated attention over several GPUs" if len(panels) > 1 else "Dilated attention: the same tokens a GPU"
    figure, axes = new_figure(title, facts, len(panels), max(7.5, 5.2 * len(panels)), 4.6)
    for part, each in zip(panels, axes, strict=True):
        if part == "weak":
            _draw_scaling(figure, each, weak, counts, "time, × one GPU", [1.0] * len(counts))
            each.set_title("each GPU has its own tokens", fontsize=10)
            each.set_ylim(0.9, max(1.15, each.get_ylim()[1]))
        elif part == "strong":
            _draw_scaling(figure, each, strong, counts, "speed, × one GPU", counts)
            each.set_title("all GPUs share the tokens", fontsize=10)
        else:
            _draw_peers(each, cases, peers, max(counts))
    return figure


def training(result: Result) -> Figure | None:
    """Tokens a second of single measurements, time over length, and how far options change the loss."""
    points = [point for point in result["points"] if "median_seconds" in point]
    rates = [point for point in points if point["part"] in ("throughput", "longest") and not point["dense"]]
    lines = _step_lines(points)
    curves = [point for point in points if "difference" in point and point["name"] != "plain"]
    parts = [part for part, there in (("rates", rates), ("lines", lines), ("curves", curves)) if there]
    if not parts:
        return None
    facts = hardware(result["runs"][-1]["environment"], 1, "the paper's model of 86M parameters unless named")
    width, height = max(8.5, 6.2 * len(parts)), 5.2 if len(rates) > 3 or len(parts) > 1 else 3.6
    figure, axes = new_figure("Training steps on one GPU", facts, len(parts), width, height)
    for part, each in zip(parts, axes, strict=True):
        if part == "rates":
            _draw_rates(each, rates)
        elif part == "lines":
            _draw_step_lines(figure, each, lines)
        else:
            _draw_differences(each, curves)
    return figure


def _lines_of(results: Sequence[Result], a_token: bool, modes: Mapping[str, str] = MODES) -> list[Line]:
    """The lines of results of ``billion.py``, a marker for each; those with one point are left out."""
    lines = []
    for result, marker in zip(results, MARKERS, strict=False):
        for mode, name in modes.items():
            measured = [point for point in result["points"] if point["mode"] == mode and "seconds" in point]
            times = [(point["tokens"], statistics.median(point["seconds"])) for point in measured]
            points = [(tokens, 1e9 * time / tokens) for tokens, time in times] if a_token else times
            if len(points) > 1:
                color = FULL if mode.startswith("dense") else DILATED
                lines.append(Line(f"{name}, {_machine(result)}", points, color, mode.endswith("train"), marker))
    return lines


def _draw_same_time(axes: Any, lines: Sequence[Line], a_token: bool) -> None:
    """Draw the same time for every token, going by the longest sequence of the first line."""
    tokens, value = max(lines[0].points)
    shortest = min(tokens for line in lines for tokens, _ in line.points)
    points = [(x, value if a_token else value / tokens * x) for x in (shortest, tokens)]
    draw_ideal(axes, points, "ideal: the same time a token", below=True)


def _machine(result: Result) -> str:
    """Number and name of the GPUs of a result of ``billion.py``."""
    return f"{result['ranks']} × {result['gpu'].removeprefix('NVIDIA ').removesuffix(' 80GB HBM3') or 'CPU'}"


def _model(results: Sequence[Result]) -> str:
    """Depth and width of the model of ``billion.py``."""
    model = results[0]["model"]
    return f"{model['layers']} layers of width {model['dim']}"


def _weak(cases: Mapping[tuple[int, int], float]) -> dict[int, dict[int, float]]:
    """Time over that of one GPU, by tokens a GPU and GPUs."""
    found: dict[int, dict[int, float]] = {}
    for (rows, gpus), ms in cases.items():
        if rows % gpus == 0 and (rows // gpus, 1) in cases:
            found.setdefault(rows // gpus, {})[gpus] = ms / cases[rows // gpus, 1]
    return {rows: ratios for rows, ratios in found.items() if len(ratios) > 1}


def _strong(cases: Mapping[tuple[int, int], float]) -> dict[int, dict[int, float]]:
    """Speed over that of one GPU, by tokens of all GPUs and GPUs."""
    found: dict[int, dict[int, float]] = {}
    for (rows, gpus), ms in cases.items():
        if (rows, 1) in cases:
            found.setdefault(rows, {})[gpus] = cases[rows, 1] / ms
    return {rows: ratios for rows, ratios in found.items() if len(ratios) > 1}


def _draw_scaling(
    figure: Figure,
    axes: Any,
    lines: Mapping[int, Mapping[int, float]],
    counts: Sequence[int],
    ylabel: str,
    ideal: Sequence[float],
) -> None:
    """Lines over the number of GPUs, a label with the tokens and the last value at each."""
    for marker, (_, ratios) in zip(MARKERS, sorted(lines.items()), strict=False):
        axes.plot(*zip(*sorted(ratios.items()), strict=True), marker=marker, markersize=5, color=DILATED)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(xlabel="GPUs", ylabel=ylabel, xlim=(counts[0] - 0.15, counts[-1] * 1.0 + 0.45 * (counts[-1] - counts[0])))
    draw_ideal(axes, list(zip(counts, ideal, strict=True)), "ideal", below=ideal[-1] == 1)
    ends = [(rows, max(ratios), ratios[max(ratios)]) for rows, ratios in sorted(lines.items())]
    labels = [
        (f"{short_length(rows)}: {value:.{3 if ideal[-1] == 1 else 2}f} ×", (gpus, value), DILATED)
        for rows, gpus, value in ends
    ]
    label_ends(figure, axes, labels)


def _draw_peers(
    axes: Any, cases: Mapping[tuple[int, int], float], peers: Sequence[tuple[str, int, float]], gpus: int
) -> None:
    """Milliseconds of full attention beside those of dilated attention, logarithmic bars."""
    bars, text = [], []
    for rows in sorted({rows for _, rows, _ in peers}):
        ours = cases[rows, gpus]
        bars.append((f"{short_length(rows)}, dilated", ours, DILATED))
        text.append(f"{ours:.1f} ms")
        for name, of, ms in peers:
            if of == rows:
                bars.append((f"{short_length(rows)}, full: {name}", ms, FULL))
                text.append(f"{ms:,.0f} ms ({ms / ours:.0f} ×)")
    draw_bars(axes, bars, "ms, forward + backward", text)
    axes.set(xscale="log", xlim=(1, 40 * max(ms for _, ms, _ in bars)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.minorticks_off()
    axes.set_title(f"dilated and full attention on {gpus} GPUs", fontsize=10)


def _step_lines(points: Sequence[Result]) -> list[Line]:
    """Seconds of the paper's model with full checkpointing, dilated and full attention, if there are two lengths."""
    lines = []
    for dense, label, color in ((False, "dilated attention", DILATED), (True, "full attention", FULL)):
        found = {
            point["rows"]: point["median_seconds"]
            for point in points
            if point["part"] in ("baseline", "longest") and point["dense"] == dense and point["name"] != "vocabulary"
        }
        if len(found) > 1:
            lines.append(Line(label, sorted(found.items()), color))
    return lines


def _draw_step_lines(figure: Figure, axes: Any, lines: Sequence[Line]) -> None:
    """Draw seconds of a step over length, and what the same time a token would be."""
    draw_over_length(axes, lines, "seconds a training step", sorted({n for line in lines for n, _ in line.points}))
    (first, seconds), (last, _) = min(lines[0].points), max(lines[0].points)
    draw_ideal(axes, [(first, seconds), (last, seconds * last / first)], "ideal: the same time a token", below=True)
    label_lines(figure, axes, lines)
    axes.set_title("full checkpointing, bf16; 4M: also offloaded", fontsize=10)


def _draw_rates(axes: Any, points: Sequence[Result]) -> None:
    """Tokens a second of each measurement, with its MFU; of several takes of one the newest."""
    newest = {(point["name"], point["rows"]): point for point in points}
    names = {"paper": "longest sequence", "vocabulary": "longest, 100,277 ids"}
    bars: list[tuple[str, float, str]] = []
    text: list[str] = []
    for (name, rows), point in sorted(newest.items(), key=lambda item: (item[0][1], item[0][0])):
        what = names.get(name, "selective" if name.startswith("tile ") else name.replace(", ", ",\n", 1))
        what = what.replace("12 projections", "12 blocks keep q, k, v")
        bars.append((f"{short_length(rows)} tokens,\n{what}", point["tokens_per_second"] / 1e3, DILATED))
        mfu = "" if point["mfu"] is None else f"  (MFU {100 * point['mfu']:.1f} %)"
        text.append(f"{point['tokens_per_second'] / 1e3:,.0f}{mfu}")
    draw_bars(axes, bars, "thousand tokens a second", text)
    axes.margins(x=0.45)
    axes.set_title("one sequence a step", fontsize=10)


def _draw_differences(axes: Any, curves: Sequence[Result]) -> None:
    """The largest relative difference of a loss from the run without options; the same run again in grey."""
    names = {
        "plain again": "the same run again",
        "projections": "keep projections",
        "host": "full, offloaded",
        "tiles": "feed-forward tiles",
    }
    ordered = sorted(curves, key=lambda point: (point["name"] != "plain again", point["name"]))
    colors = [IDEAL if point["name"] == "plain again" else DILATED for point in ordered]
    bars = [
        (str(names.get(point["name"], point["name"])), point["difference"] * 1e6, color)
        for point, color in zip(ordered, colors, strict=True)
    ]
    draw_bars(axes, bars, "largest difference in loss, 10⁻⁶")
    axes.set_title(f"{len(curves[0]['losses'])} steps in {curves[0]['precision']}, against no option", fontsize=10)


def save_picture(figure: Figure | None, path: Path) -> None:
    """Write a benchmark's picture, or none where there is not enough to draw yet."""
    if figure is not None:
        save(figure, path)


def read(*names: str) -> list[Result]:
    """The committed results of these names."""
    return [json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in names]


PICTURES: Mapping[str, Callable[[], Figure | None]] = {
    "attention.png": lambda: attention(*read("attention_speed.json")),
    "billion.png": lambda: billion(read("billion_h100.json", "billion_h200.json", "billion_2xh200.json")),
    "scaling.png": lambda: scaling(*read("scaling.json")),
    "scaling_2e27_rows_a_gpu.png": lambda: scaling(*read("scaling_2e27_rows_a_gpu.json")),
    "scaling_2xh200.png": lambda: scaling(*read("scaling_2xh200.json")),
    "scaling_4xh200.png": lambda: scaling(*read("scaling_4xh200.json")),
    "token_time.png": lambda: token_time(read("billion_h100.json", "billion_h200.json")),
    "training_h100.png": lambda: training(*read("training_h100.json")),
    "training_h200.png": lambda: training(*read("training_h200.json")),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder (default: beside the JSON)")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        save_picture(draw(), options.output / name)
        print(options.output / name)


if __name__ == "__main__":
    main()
