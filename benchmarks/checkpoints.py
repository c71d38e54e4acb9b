"""What checkpoints cost a training run: steps a second without them, written beside the training, and waited for.

    python benchmarks/checkpoints.py [--steps 21] [--every 5] [--rounds 3] [--output FILE] [key=value ...]

Trains the quick start, or what the settings make of it, in one process for each GPU or in two on the CPU. The modes
take turns, so that a drift of the machine hits all. A run's rate is that of its steps after the first, by the clock of
its TensorBoard events; what happens before and after them, a checkpoint at the end too, does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment
from longnet_dist.checkpoint.format import checkpoints

MODEL = ("model.dim=512", "model.layers=12", "model.heads=8", "data.sequence_length=64", "train.batch_size=1")
CPU_PROCESSES = 2
NEVER = 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=21)
    parser.add_argument("--every", type=int, default=5, help="steps from one checkpoint to the next")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/checkpoints.json"))
    parser.add_argument("settings", nargs="*", default=MODEL, metavar="key=value")
    args = parser.parse_args()

    modes = {
        "none": (f"train.checkpoint_every={NEVER}",),
        "asynchronous": (f"train.checkpoint_every={args.every}", "train.checkpoint_async=true"),
        "synchronous": (f"train.checkpoint_every={args.every}", "train.checkpoint_async=false"),
    }
    rates: dict[str, list[float]] = {name: [] for name in modes}
    for _ in tqdm(range(args.rounds), unit="round"):
        for name, mode in modes.items():
            rate, num_bytes = train([*args.settings, *mode], args.steps)
            rates[name].append(rate)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    # The first step is not counted, and a checkpoint after the last is not waited for.
    num_checkpoints = (args.steps - 1) // args.every
    lost = {
        name: (args.steps - 1) * (1 / rate - 1 / medians["none"]) / num_checkpoints for name, rate in medians.items()
    }
    result = {
        "command": f"python benchmarks/checkpoints.py {' '.join(sys.argv[1:])}".strip(),
        "environment": environment(),
        "settings": args.settings,
        "steps_between_checkpoints": args.every,
        "checkpoint_bytes": num_bytes,
        "steps_per_second": rates,
        "median_steps_per_second": medians,
        "seconds_lost_per_checkpoint": lost,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"a checkpoint of {num_bytes / 2**20:.0f} MiB every {args.every} steps")
    for name, rate in medians.items():
        share = 1 - rate / medians["none"]
        print(f"{name:>13} {rate:8.3f} steps/s, {100 * share:5.1f} % lost, {lost[name]:6.2f} s a checkpoint")


def train(settings: list[str], steps: int) -> tuple[float, int]:
    """Steps a second of a run, and the size of its last checkpoint."""
    ranks = torch.cuda.device_count() or CPU_PROCESSES
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["launch/train.py", *settings, f"train.steps={steps}", "train.validate_every=0", "train.sample_tokens=0"]
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="runs") as folder:  # on the disk of the checkout; /tmp may be memory
        done = subprocess.run(
            [*command, f"train.output_dir={folder}/run"], env=_environment(), capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
        events = EventAccumulator(f"{folder}/run/tensorboard").Reload().Scalars("train/loss")
        seconds = events[-1].wall_time - events[0].wall_time
        size = sum(file.stat().st_size for file in checkpoints(Path(folder) / "run")[-1].iterdir())
    return (events[-1].step - events[0].step) / seconds, size


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}


if __name__ == "__main__":
    main()
