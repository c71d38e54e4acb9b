"""Whether ``train.deterministic`` repeats a run in every bit, also over a restart, and what it costs.

    python benchmarks/deterministic.py [key=value ...] [--config paper] [--steps 8] [--rounds 2] [--output FILE.json]

Runs of ``--steps`` steps: without ``train.deterministic`` and with it, by turns. One more with it goes on from the
checkpoint in the middle of the first. All runs with it must end in the same weights and losses; status 1 where they do
not. ``cost`` is the ratio of the medians of the step times, without the first two steps of each run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment, output_file
from benchmarks.runs import metrics_of_run
from benchmarks.text import write_text
from longnet_dist.checkpoint.format import checkpoints, saved_tensors

UNTIMED = 2
"""Steps of a run in which kernels are compiled."""


def main(arguments: list[str] | None = None) -> int:
    """Measure as the command line says."""
    options = _parser().parse_intermixed_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options, Path(scratch))
    result["command"] = shlex.join(["python", "benchmarks/deterministic.py", *sys.argv[1:]])
    result["environment"] = environment()
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "losses"}, indent=1))
    return 0 if result["equal"] else 1


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run all, and return step times, losses, the cost and whether the runs are equal."""
    data = scratch / "text.tokens"
    write_text(data, options.tokens, [Path(__file__).resolve().parents[1] / "longnet_dist"])
    seconds: dict[bool, list[float]] = {False: [], True: []}
    losses: dict[str, list[float]] = {}
    ends: list[Path] = []

    def run(name: str, deterministic: bool, resume: str = "never") -> list[dict[str, Any]]:
        settings = [
            f"data.path={data}", f"train.steps={options.steps}", f"train.deterministic={str(deterministic).lower()}",
            f"train.checkpoint_every={options.steps // 2}", f"train.resume={resume}", *options.settings,
        ]  # fmt: skip
        return metrics_of_run(options.config, scratch / name, 1, settings, options.device)

    for turn in range(options.rounds):
        for deterministic in (False, True)[:: -1 if turn % 2 else 1]:
            name = f"{'deterministic' if deterministic else 'as it is'} {turn + 1}"
            metrics = run(name.replace(" ", "_"), deterministic)
            losses[name] = [step["loss"] for step in metrics]
            seconds[deterministic] += [step["step_seconds"] for step in metrics[UNTIMED:]]
            if deterministic:
                ends.append(scratch / name.replace(" ", "_"))
    resumed = run("restarted", True, resume=str(checkpoints(ends[0])[0]))
    first = next(own for name, own in losses.items() if name.startswith("deterministic"))
    losses["deterministic, restarted"] = first[: options.steps // 2] + [step["loss"] for step in resumed]
    ends.append(scratch / "restarted")
    medians = {name: statistics.median(seconds[value]) for name, value in (("without", False), ("with", True))}
    found = [differences(ends[0], end) for end in ends[1:]]
    same_losses = len({tuple(own) for name, own in losses.items() if name.startswith("deterministic")}) == 1
    return {
        "equal": same_losses and not any(found),
        "differences": found,
        "cost": medians["with"] / medians["without"],
        "step_seconds": medians,
        "all_step_seconds": {"without": seconds[False], "with": seconds[True]},
        "losses": losses,
    }


def differences(run: Path, other: Path) -> dict[str, float]:
    """The weights in which the last checkpoints of two runs differ, and by how much at most."""
    saved, others = (saved_tensors(checkpoints(folder)[-1]) for folder in (run, other))
    pairs = {name: (saved.read(name), others.read(name)) for name in saved.shapes}
    return {name: float((one - two).abs().max()) for name, (one, two) in pairs.items() if not torch.equal(one, two)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--config", default="paper")
    parser.add_argument("--steps", type=int, default=8, help="even (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2**23, help="of the text (default %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output", type=output_file, default=Path("benchmarks/results/deterministic.json"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
