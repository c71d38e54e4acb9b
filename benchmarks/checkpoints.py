"""What checkpoints cost a training run: steps a second without them, written beside the training, and waited for.

    python benchmarks/checkpoints.py [--steps 21] [--every 5] [--rounds 3] [--output FILE] [key=value ...]

Trains the quick start, or what the settings make of it, in one process for each GPU or in two on the CPU. The modes
take turns, so that a drift of the machine hits all. A run's rate is that of its steps after the first, by the clock of
its TensorBoard events; what happens before and after them, a checkpoint at the end too, does not count.

    python benchmarks/checkpoints.py --parts [--rounds 3] [--output FILE] [key=value ...]

Measures one checkpoint at a time on 1, 2 and 4 CPU ranks, written by rank 0 and by all ranks in parts: the seconds of
the copy and of the writing, the growth of each rank's resident memory, and the bytes that each rank takes part in
gathering.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.multiprocessing.spawn import start_processes
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment, output_file
from benchmarks.runs import import_paths
from longnet_dist.checkpoint.format import checkpoints
from longnet_dist.checkpoint.writer import take_snapshot

MODEL = ("model.dim=512", "model.layers=12", "model.heads=8", "data.sequence_length=64", "train.batch_size=1")
CPU_PROCESSES = 2
RANKS = (1, 2, 4)
NEVER = 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=21)
    parser.add_argument("--every", type=int, default=5, help="steps from one checkpoint to the next")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", action="store_true", help="whole checkpoints and those in parts, on CPU ranks")
    parser.add_argument(
        "--output", type=output_file, help="benchmarks/results/checkpoints.json or checkpoint_parts.json"
    )
    parser.add_argument("settings", nargs="*", default=MODEL, metavar="key=value")
    args = parser.parse_args()
    name = "checkpoint_parts.json" if args.parts else "checkpoints.json"
    args.output = args.output or Path("benchmarks/results") / name
    if args.parts:
        measure_parts(args)
        return

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


def measure_parts(args: argparse.Namespace) -> None:
    """Measure checkpoints of rank 0 and of all ranks; print and write what was found."""
    from longnet_dist.comm.launch_env import LaunchEnvironment
    from longnet_dist.train.deepspeed_engine import prepare_deepspeed

    prepare_deepspeed(LaunchEnvironment(), torch.device("cpu"))  # imported once, before ranks are forked
    found = []
    for ranks in RANKS:
        for parts in ("one", "ranks") if ranks > 1 else ("one",):
            settings = [*args.settings, "deepspeed.zero_stage=1", f"train.checkpoint_parts={parts}"]
            seen = on_ranks(ranks, settings, args.rounds)
            values = {
                "ranks": ranks,
                "zero_stage": 1,
                "written_by": "rank 0" if parts == "one" else "all ranks",
                "copy_seconds": max(statistics.median(rank["copy_seconds"]) for rank in seen),
                "write_seconds": max(statistics.median(rank["write_seconds"]) for rank in seen),
                "memory_growth_by_rank": [max(rank["memory_growth"]) for rank in seen],
                "gathered_bytes_by_rank": [rank["gathered_bytes"] for rank in seen],
                "checkpoint_bytes": seen[0]["checkpoint_bytes"],
            }
            found.append(values)
            growth = ", ".join(f"{size / 2**20:.0f}" for size in values["memory_growth_by_rank"])
            print(
                f"{ranks} ranks, written by {values['written_by']}: copy "
                f"{values['copy_seconds']:.2f} s, write {values['write_seconds']:.2f} s, memory {growth} MiB, "
                f"gathered {values['gathered_bytes_by_rank'][0] / 2**20:.0f} MiB a rank"
            )
    command = f"python benchmarks/checkpoints.py {' '.join(sys.argv[1:])}".strip()
    result = {"command": command, "environment": environment(), "settings": list(args.settings), "checkpoints": found}
    args.output.write_text(json.dumps(result, indent=1) + "\n")


def on_ranks(ranks: int, settings: list[str], rounds: int) -> list[dict[str, Any]]:
    """Results of :func:`_measure` on ranks of this machine."""
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path("runs").resolve()) as folder:
        start_processes(_measure, (ranks, folder, settings, rounds), ranks, start_method="fork")
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def _measure(rank: int, ranks: int, folder: str, settings: list[str], rounds: int) -> None:
    from longnet_dist.checkpoint.format import Progress
    from longnet_dist.checkpoint.writer import CheckpointWriter
    from longnet_dist.comm.launch_env import LaunchEnvironment
    from longnet_dist.config.loading import load_config
    from longnet_dist.config.packaged import find_config
    from longnet_dist.train.deepspeed_engine import prepare_deepspeed
    from longnet_dist.train.loop import Trainer
    from longnet_dist.train.setup import RunSetup

    torch.set_num_threads(1)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(zip(names, map(str, (rank, rank, ranks, ranks)), strict=True))
    device, launch = torch.device("cpu"), LaunchEnvironment(rank, ranks, rank, ranks)
    own = [f"train.output_dir={folder}/run", "train.checkpoint_async=false", "train.keep_last=1"]
    config = load_config(find_config("quickstart"), [*settings, *own])
    prepare_deepspeed(launch, device)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    trainer = Trainer(RunSetup.make(config, ranks, "cpu"), device)
    trainer._train_step(0, 1e-4)
    gathered = _count_collectives()
    seen: dict[str, Any] = {"copy_seconds": [], "write_seconds": [], "memory_growth": []}
    with CheckpointWriter(config.train.output_dir, config.train, config.model) as writer:
        for step in range(1, rounds + 1):
            gathered.clear()
            dist.barrier()
            before, began = _reset_peak(), time.perf_counter()
            snapshot = take_snapshot(trainer.engine, in_parts=config.train.checkpoint_parts == "ranks" and ranks > 1)
            seen["copy_seconds"].append(time.perf_counter() - began)
            seen["gathered_bytes"] = sum(gathered)
            del snapshot
            dist.barrier()
            began = time.perf_counter()
            writer.save(trainer.engine, Progress(step=step, tokens=step))
            dist.barrier()
            seen["write_seconds"].append(time.perf_counter() - began - seen["copy_seconds"][-1])
            seen["memory_growth"].append(_status("VmHWM") - before)
    seen["checkpoint_bytes"] = sum(file.stat().st_size for file in checkpoints(Path(folder) / "run")[-1].iterdir())
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def _count_collectives() -> list[int]:
    """Let the collectives that gather tensors note the bytes that this rank gets."""
    sizes: list[int] = []

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def count(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            sizes.append(tensor.numel() * tensor.element_size())
            return function(tensor, *arguments, **options)

        return count

    for name in ("all_reduce", "all_gather_into_tensor"):
        setattr(dist, name, counting(getattr(dist, name)))
    return sizes


def _reset_peak() -> int:
    """Forget the peak of this process's resident memory, on Linux; return what it is now, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


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
    return os.environ | {"PYTHONPATH": import_paths()}


if __name__ == "__main__":
    main()
