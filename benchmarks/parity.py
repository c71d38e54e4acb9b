"""The same training run on every layout: losses and gradient norms step by step.

    python benchmarks/parity.py [--steps 20] [--output benchmarks/results/parity.json]
    python benchmarks/parity.py --device cuda --steps 50 --parallel 3 --output parity_gpu.json

Trains the quick start through torchrun and compares each run's ``metrics.jsonl`` with that of one process. On the CPU
in float32: 1, 2 and 4 sequence ranks, ZeRO stages 0 to 3, data × sequence meshes. On two GPUs in float32 and bf16, with
heads of 64; what bf16 alone changes is the difference of one GPU's bf16 run from its float32 run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment, output_file
from benchmarks.runs import metrics_of_run

Curves = dict[str, list[float]]


@dataclass(frozen=True)
class Layout:
    """How a run is laid out; ``again`` sets a repetition apart."""

    data: int
    sequence: int
    zero: int
    precision: str = "fp32"
    again: bool = False

    @property
    def name(self) -> str:
        again = " again" if self.again else ""
        return f"{self.precision} data={self.data} sequence={self.sequence} zero={self.zero}{again}"

    @property
    def settings(self) -> list[str]:
        return [
            f"parallel.data={self.data}",
            f"parallel.sequence={self.sequence}",
            f"deepspeed.zero_stage={self.zero}",
            f"train.precision={self.precision}",
        ]


# The first of each precision is what the others are compared with.
LAYOUTS = {
    "cpu": [Layout(*mesh, stage) for mesh in ((1, 1), (1, 2), (1, 4), (2, 2)) for stage in range(4)],
    "cuda": [
        Layout(1, 1, 0),
        Layout(1, 2, 2),
        Layout(1, 2, 3),
        Layout(2, 1, 2),
        Layout(1, 1, 1, "bf16"),
        Layout(1, 1, 1, "bf16", again=True),
        Layout(1, 2, 2, "bf16"),
        Layout(1, 2, 3, "bf16"),
        Layout(2, 1, 2, "bf16"),
    ],
}
# On GPUs heads that the fastest kernels take, and no minute of compiling before each run.
SETTINGS = {"cpu": [], "cuda": ["model.dim=256", "model.heads=4", "train.compile=false"]}


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_intermixed_args(arguments)
    layouts = [layout for layout in LAYOUTS[options.device] if layout.precision in options.precisions]
    runs: dict[str, Curves] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.parallel) as pool:
        train = partial(curves, Path(folder), options)
        first, *others = layouts
        runs[first.name] = train(first)  # alone, since it makes the corpus; without it there is nothing to compare
        jobs = {layout.name: pool.submit(train, layout) for layout in others}
        for name, job in tqdm(jobs.items(), unit="run"):
            try:
                runs[name] = job.result()
            except RuntimeError as error:
                failed[name] = str(error)
            write(options, layouts, runs, failed)
    for name, values in differences(layouts, runs).items():
        print(f"{name:<38} {values['loss']:9.1e} {values['grad_norm']:9.1e}   from {values['base']}")
    for name, reason in failed.items():
        print(f"{name:<38} failed: {reason}")


def curves(folder: Path, options: argparse.Namespace, layout: Layout) -> Curves:
    """Losses and gradient norms of a run."""
    settings = [*layout.settings, *SETTINGS[options.device], f"train.steps={options.steps}", *options.settings]
    ranks, place = layout.data * layout.sequence, folder / layout.name.replace(" ", "_")
    lines = metrics_of_run("configs/quickstart.yaml", place, ranks, settings, options.device)
    return {key: [line[key] for line in lines] for key in ("loss", "grad_norm")}


def differences(layouts: list[Layout], runs: dict[str, Curves]) -> dict[str, dict[str, float | str]]:
    """The largest relative difference of each run over all steps, from the first of its precision, or of all."""
    bases = {layout.precision: layout.name for layout in reversed(layouts)}
    found: dict[str, dict[str, float | str]] = {}
    for layout in layouts:
        base = bases[layout.precision] if layout.name != bases[layout.precision] else layouts[0].name
        if layout.name in runs and base in runs:
            pairs = {key: zip(runs[layout.name][key], runs[base][key], strict=True) for key in ("loss", "grad_norm")}
            worst = {key: max(abs(a - b) / abs(b) for a, b in values) for key, values in pairs.items()}
            found[layout.name] = {**worst, "base": base}
    return found


def write(options: argparse.Namespace, layouts: list[Layout], runs: dict[str, Curves], failed: dict[str, str]) -> None:
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment(),
        "largest_relative_difference": differences(layouts, runs),
        "failed": failed,
        "runs": runs,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the configuration of all runs")
    parser.add_argument("--device", choices=list(LAYOUTS), default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--parallel", type=int, default=1, help="runs at the same time")
    parser.add_argument("--output", type=output_file, default=Path("benchmarks/results/parity.json"))
    return parser


if __name__ == "__main__":
    main()
