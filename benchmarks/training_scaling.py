"""Whole training steps on 1, 2, 4, … GPUs: tokens a second of ``launch/train.py``, by the numbers of its metrics.

    python benchmarks/training_scaling.py configs/paper.yaml deepspeed.zero_stage=2 --gpus 1 2 --rows 1048576
    python benchmarks/training_scaling.py configs/paper.yaml deepspeed.zero_stage=2 --gpus 1 2 --rows 4194304 --strong

Every GPU holds ``--rows`` rows of one sequence (weak scaling), or its share of ``--rows`` (``--strong``). Seconds are
the median of the steps but the first ones. A run that fails is recorded with what it said.

``--sockets`` switches off NVLink, shared memory and InfiniBand, so that GPUs of one machine meet as those of machines
with a plain network do.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment, output_file
from benchmarks.runs import metrics_of_run

SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1", "NCCL_NET": "Socket"}
"""What NCCL is told so that GPUs of one machine use sockets."""


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_intermixed_args(arguments)
    if options.sockets:
        os.environ.update(SOCKETS)  # the ranks inherit it
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment(),
        "nccl": {name: value for name, value in os.environ.items() if name.startswith("NCCL_")},
        "points": [],
    }
    for gpus in sorted(options.gpus):
        rows = options.rows if options.strong else options.rows * gpus
        point = {"gpus": gpus, "rows": rows, **measure(options, gpus, rows)}
        result["points"].append(point)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        print(line(point, result["points"][0]), flush=True)


def measure(options: argparse.Namespace, gpus: int, rows: int) -> dict[str, Any]:
    """Seconds and tokens a second of a step, and the metrics of the last; or what the run said when it failed."""
    settings = [f"data.sequence_length={rows}", f"parallel.sequence={gpus}", "parallel.data=1", "train.batch_size=1"]
    settings += [f"train.steps={options.first_steps + options.steps}", *options.settings]
    with tempfile.TemporaryDirectory() as folder:
        try:
            lines = metrics_of_run(options.config, Path(folder) / "run", gpus, settings, options.device)
        except RuntimeError as error:
            return {"error": str(error)}
    seconds = [step["step_seconds"] for step in lines[options.first_steps :]]
    median = statistics.median(seconds)
    return {"seconds": seconds, "median_seconds": median, "tokens_per_second": rows / median, "last_step": lines[-1]}


def line(point: dict[str, Any], first: dict[str, Any]) -> str:
    """A point in words, with its efficiency: its tokens a second and GPU by those of the first point."""
    head = f"{point['gpus']:>4} GPUs {point['rows']:>12,} rows"
    if "error" in point:
        return f"{head}  failed: {point['error']}"
    text = f"{head} {point['median_seconds']:>9.3f} s a step {point['tokens_per_second']:>12,.0f} tokens/s"
    if "error" in first:
        return text
    share = point["tokens_per_second"] / point["gpus"] / (first["tokens_per_second"] / first["gpus"])
    return f"{text}  efficiency {share:.3f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config", help="file of the configuration")
    add("settings", nargs="*", metavar="key=value", help="over the configuration's")
    add("--gpus", type=int, nargs="+", required=True)
    add("--rows", type=int, required=True, help="of a GPU; with --strong of all")
    add("--strong", action="store_true")
    add("--sockets", action="store_true", help="without NVLink, shared memory and InfiniBand")
    add("--steps", type=int, default=5, help="that count (default %(default)s)")
    add("--first-steps", type=int, default=3, help="that do not: they compile and make state (default %(default)s)")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--output", type=output_file, default=Path("benchmarks/results/training_scaling.json"))
    return parser


if __name__ == "__main__":
    main()
