"""Steps of a small model beside the time in which its GPU works: launched one by one, and as CUDA graphs.

    python benchmarks/small_steps.py [key=value ...] --output benchmarks/results/small_steps_h200.json

By default 27M parameters (6 × 512) train on 65,536 tokens a step. Each variant is one run. A step's time is the median
over the steps from ``--first`` on, except a few that are profiled: their traces give the time of the GPU, and the gaps
in it (``benchmarks/gpu_gaps.py``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.gpu_gaps import busy_intervals, gaps, read
from benchmarks.record import environment, output_file
from benchmarks.runs import metrics_of_run

MODEL = (
    "model.dim=512", "model.layers=6", "model.heads=8", "model.vocab_size=16384", "model.positions=rope",
    "model.segment_lengths=[2048,4096,8192,16384,32768]", "model.dilation_rates=[1,2,4,6,12]",
    "data.sequence_length=32768", "train.batch_size=2", "train.activation_checkpointing=selective",
    "train.warmup_steps=10", "train.loggers=[jsonl]",
)  # fmt: skip
VARIANTS = {"launches": "train.cuda_graph=false", "graphs": "train.cuda_graph=true"}
PROFILED = 5


def main(arguments: list[str] | None = None) -> None:
    """Measure as the command line says."""
    options = _parser().parse_intermixed_args(arguments)
    given = {word.partition("=")[0] for word in options.settings}
    settings = [*options.settings, *(word for word in MODEL if word.partition("=")[0] not in given)]
    result: dict[str, Any] = {"environment": environment(), "settings": settings}
    for name in options.variants:
        with tempfile.TemporaryDirectory() as folder:
            result[name] = measure(Path(folder) / "run", [*settings, VARIANTS[name]], options)
        print(f"{name}: {json.dumps(result[name])}", flush=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(folder: Path, settings: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Train a run in ``folder``; its steps, ms, and what its traces say of the GPU."""
    last = options.first + 2 * options.steps + PROFILED
    profiled = options.first + options.steps
    words = [f"train.steps={last}", f"train.profile={{first: {profiled + 1}, steps: {PROFILED}}}"]
    metrics = metrics_of_run(options.config, folder, 1, [*settings, *words], options.device)
    seconds = {line["step"]: line["step_seconds"] for line in metrics if "step_seconds" in line}
    # The step behind the profiled ones ends the profile.
    counted = sorted(
        1e3 * value
        for step, value in seconds.items()
        if step > options.first and not profiled < step <= profiled + PROFILED + 1
    )
    tenth = len(counted) // 10
    found: dict[str, Any] = {
        "step_ms": statistics.median(counted),
        "tenth_ms": counted[tenth],
        "ninth_tenth_ms": counted[-1 - tenth],
        "steps": len(counted),
        "losses": [line["loss"] for line in metrics if line.get("step", 0) in (1, last)],
    }
    traces = sorted(folder.glob("profile/*.trace.json.gz"))
    return found | (_of_gpu(traces[0], found["step_ms"]) if options.device == "cuda" else {})


def _of_gpu(trace: Path, step_ms: float) -> dict[str, Any]:
    """The GPU's time of a step, ms, how much longer a step is, and before what the GPU waits most."""
    events = read(trace)
    gpu_ms = sum(stop - start for start, stop in busy_intervals(events)) / PROFILED / 1e3
    waits: dict[str, float] = defaultdict(float)
    for gap in gaps(events, 20.0):
        waits[gap.host] += gap.length / PROFILED / 1e3
    longest = sorted(waits.items(), key=lambda wait: -wait[1])[:8]
    kernels = sum(event.get("cat") == "kernel" for event in events) / PROFILED
    return {"gpu_ms": gpu_ms, "over_gpu": step_ms / gpu_ms - 1, "kernels": kernels, "waits_ms": dict(longest)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("settings", nargs="*", metavar="key=value", help="settings of the runs")
    add("--config", default="configs/quickstart.yaml", help="configuration whose data and other keys are used")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--first", type=int, default=20, metavar="n", help="steps that are not counted")
    add("--steps", type=int, default=60, metavar="n", help="steps counted before the profiled ones, and after")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--output", type=output_file, default=Path("benchmarks/results/small_steps.json"))
    return parser


if __name__ == "__main__":
    main()
