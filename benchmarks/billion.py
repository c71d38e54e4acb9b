"""From 8K to a billion tokens in one sequence: time, memory and FLOPs of a streamed model, dense attention beside it.

    python benchmarks/billion.py                                   # 2^13 … 2^30 tokens, as far as --seconds allow
    torchrun --nproc_per_node=2 benchmarks/billion.py --modes train --powers 30 --train-chunk 1048576

LongNet's Figure 5 with a training step beside the forward. ``forward`` is a streamed forward with the loss of every
token; ``train`` a whole training step: a streamed forward that records, forward and backward of the chunks in reverse,
all-reduce, AdamW; ``dense`` and ``dense-train`` the same with full attention (torch's
``scaled_dot_product_attention``), unstreamed, on one device, until memory or ``--dense-seconds`` end. Lengths go from
small to large and every result is written at once: a run that was cut goes on with the same ``--output``.

Model FLOPs of a forward: 2 · N · (weights of all matrix products) + layers · 4 · D · (attended pairs of query and key),
exact. A training step counts 3 times that: the recording forward is not counted. MFU is model FLOPs a second over the
peak of all GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks import pictures
from benchmarks.jobs import Job, model_flops
from benchmarks.pictures import save_picture
from benchmarks.record import environment, output_file
from benchmarks.text import DEFAULT_FOLDERS, write_text
from longnet_dist import DilatedPattern, LongNetConfig
from longnet_dist.checkpoint.run_folder import write_text as write_file
from longnet_dist.cli.program.exit_status import run_cli
from longnet_dist.comm.launch_env import LaunchEnvironment, process_group
from longnet_dist.data.batches import Windows
from longnet_dist.data.token_file import TokenFile
from longnet_dist.errors import ConfigError
from longnet_dist.estimate.devices import device_of
from longnet_dist.estimate.model_cost import matrix_weights
from longnet_dist.machine import peak_resident_bytes

MODES = ("forward", "train", "dense", "dense-train")
REPEAT_BELOW_SECONDS = 5.0
REPEATS = 3
WARM_UP_DENSE = 2**12  # rows


def folder_names(source: str) -> str:
    """A token file's ``source``, folders of this machine, without where they are."""
    return ", ".join(dict.fromkeys(Path(folder).name for folder in source.split(", ")))


def main(arguments: list[str] | None = None) -> None:
    """Measure as the command line says; every rank runs this."""
    options = _parser().parse_args(arguments)
    if options.draw:
        results = [json.loads(path.read_text()) for path in options.draw]
        save_picture(pictures.billion(results), options.output.with_suffix(".png"))
        return
    launch = LaunchEnvironment.read(os.environ)
    device = launch.device()
    launch.share_cores()
    with process_group(launch, device, timedelta(minutes=30)):
        Benchmark(options, device).run()


class Benchmark:
    """All measurements of a run, on one rank."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device, self.started = options, device, time.monotonic()
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        pattern = DilatedPattern.geometric(options.base, 2**options.longest, options.ratio)
        self.config = LongNetConfig(
            dim=options.dim,
            layers=options.layers,
            heads=options.heads,
            segment_lengths=pattern.segment_lengths,
            dilation_rates=pattern.dilation_rates,
            positions="rope",  # xPos spans no billion rows
            loss_chunk=65536,
        )
        self.file, self.distinct_bytes = self._text()
        self.result = self._head()
        self.warm: set[str] = set()

    def run(self) -> None:
        """Measure every length in every mode, small lengths first."""
        stopped: set[str] = set()
        for power in sorted(self.options.powers):
            for mode in self.options.modes:
                if mode in stopped or self._points(mode, 2**power):
                    continue
                point = None if self._too_long(mode, 2**power) else self._measure(mode, 2**power)
                if point is None or "error" in point:
                    stopped.add(mode)
                if point is not None:
                    self.result["points"].append(point)
                    self._write(point)

    def _measure(self, mode: str, tokens: int) -> dict[str, Any]:
        """One point: a run if it is long, the median of some runs if they are short."""
        chunk = self._chunk(mode, tokens)
        dense, trains = mode.startswith("dense"), mode.endswith("train")
        point: dict[str, Any] = {"mode": mode, "tokens": tokens, "chunk": min(chunk, tokens)}
        losses: list[float] = []
        seconds: list[float] = []
        try:
            self._warm_up(mode)
            job = Job(self.config, Windows(self.file, "all", tokens), chunk, self.device, trains, dense)
            self._forget_peak_memory()
            while len(seconds) < REPEATS and max(seconds, default=0.0) < REPEAT_BELOW_SECONDS:
                loss, elapsed = self._timed(job)
                losses.append(loss)
                seconds.append(elapsed)
        except torch.cuda.OutOfMemoryError:
            return point | {"error": "out of memory"}
        rate = tokens / statistics.median(seconds)
        flops = model_flops(self.config, tokens, trains, dense)
        peak = self.result["peak_flops"]
        return point | {
            "seconds": seconds,
            "tokens_per_second": rate,
            "loss": losses[0],
            "peak_memory_bytes": self._peak_memory(),
            "model_flops": flops,
            "mfu": flops / tokens * rate / (peak * self.ranks) if peak else None,
        }

    def _warm_up(self, mode: str) -> None:
        """Compile and choose kernels outside the timed runs, once a mode: a first, a middle and a last chunk."""
        if mode not in self.warm:
            self.warm.add(mode)
            chunk = self._chunk(mode, WARM_UP_DENSE)
            tokens = min(3 * chunk, 2 ** max(self.options.powers))
            dense, trains = mode.startswith("dense"), mode.endswith("train")
            Job(self.config, Windows(self.file, "all", tokens), chunk, self.device, trains, dense).run()

    def _chunk(self, mode: str, tokens: int) -> int:
        """Rows that the ranks hold together at once; dense attention holds all."""
        return {"forward": self.options.chunk, "train": self.options.train_chunk}.get(mode, tokens)

    def _timed(self, job: Job) -> tuple[float, float]:
        """The loss of a run, and the seconds of the slowest rank."""
        dist.barrier()
        start = time.perf_counter()
        loss = job.run()  # reading the loss waits for the device
        elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=self.device)
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)
        return loss, elapsed.item()

    def _too_long(self, mode: str, tokens: int) -> bool:
        """Whether the time left is too short, going by the last length; dense attention has less patience. For all."""
        dense = mode.startswith("dense")
        if dense and self.ranks > 1:
            return True
        late = False
        if done := [point for point in self._points(mode) if "seconds" in point]:
            expected = statistics.median(done[-1]["seconds"]) * (tokens / done[-1]["tokens"]) ** (2 if dense else 1)
            left = self.options.seconds - (time.monotonic() - self.started)
            late = expected > min(left, self.options.dense_seconds if dense else left)
        answer = torch.tensor(int(late), device=self.device)
        dist.broadcast(answer, 0)
        return bool(answer.item())

    def _points(self, mode: str, tokens: int | None = None) -> list[dict[str, Any]]:
        return [p for p in self.result["points"] if p["mode"] == mode and tokens in (None, p["tokens"])]

    def _forget_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _peak_memory(self) -> int:
        """Of this rank's GPU; on a CPU of the process, which never falls."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return peak_resident_bytes() or 0

    def _text(self) -> tuple[TokenFile, int | None]:
        """The token file, made by rank 0 if need be, and then how many of its bytes are no repetition."""
        path, needed = self.options.data, 2 ** max(self.options.powers) + 1
        facts: list[Any] = [None]
        if self.rank == 0 and not path.exists():
            facts = [write_text(path, needed, self.options.text or DEFAULT_FOLDERS)]
        dist.broadcast_object_list(facts, 0)
        file = TokenFile.open(path)
        if file.header.num_tokens < needed:
            raise ConfigError(f"{path} has {file.header.num_tokens} tokens, {needed} are needed; use another --data")
        return file, facts[0]

    def _head(self) -> dict[str, Any]:
        """What the result file says beside its points, and the points of an earlier run that it agrees with."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        same = {
            "ranks": self.ranks,
            "gpu": name,
            "model": self.config.model_dump(mode="json"),
            "text_sha256": self.file.header.sha256,
        }
        others = {
            "command": shlex.join(["python", "-m", "benchmarks.billion", *sys.argv[1:]]),
            "environment": environment(),
            "matrix_weights": matrix_weights(self.config),
            "peak_flops": 1e12 * peak if (peak := device_of(self.device).peak_tflops) else None,
            "text_source": folder_names(self.file.header.source),
            "text_distinct_bytes": self.distinct_bytes,
        }
        if not self.options.output.exists():
            return others | same | {"points": []}
        earlier: dict[str, Any] = json.loads(self.options.output.read_text())
        if differing := [key for key, value in same.items() if earlier.get(key) != value]:
            raise ConfigError(f"{self.options.output} is of another {', '.join(differing)}; use another --output")
        return earlier

    def _write(self, point: dict[str, Any]) -> None:
        if self.rank == 0:
            output: Path = self.options.output
            output.parent.mkdir(parents=True, exist_ok=True)
            write_file(output, json.dumps(self.result, indent=2) + "\n")
            save_picture(pictures.billion([self.result]), output.with_suffix(".png"))
            print(_line(point), flush=True)


def _line(point: dict[str, Any]) -> str:
    head = f"{point['mode']:>12} {point['tokens']:>14,} tokens"
    if "error" in point:
        return f"{head}  {point['error']}"
    mfu = "" if point["mfu"] is None else f"  MFU {100 * point['mfu']:.1f} %"
    return (
        f"{head}  {statistics.median(point['seconds']):>10.3f} s  {point['tokens_per_second']:>12,.0f} tokens/s  "
        f"{point['peak_memory_bytes'] / 2**30:>7.2f} GiB  loss {point['loss']:.4f}{mfu}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--powers", type=int, nargs="+", default=[13, 15, 17, 18, 19, 20, 22, 24, 26, 28, 30], help="lengths 2^p")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--layers", type=int, default=4)
    add("--dim", type=int, default=512)
    add("--heads", type=int, default=8)
    add("--base", type=int, default=2048, help="shortest segment (default %(default)s)")
    add("--ratio", type=int, default=4, help="of segments and dilation rates to the next (default %(default)s)")
    add("--longest", type=int, default=30, metavar="P", help="longest segment reaches 2^P (default %(default)s)")
    add("--chunk", type=int, default=2**20, help="rows at once, forward (default %(default)s)")
    add("--train-chunk", type=int, default=2**18, help="rows at once, training (default %(default)s)")
    add("--seconds", type=float, default=3600.0, help="begin no measurement that would end later")
    add("--dense-seconds", type=float, default=30.0, help="longest run with dense attention (default %(default)s)")
    add("--data", type=Path, default=Path("data/billion.tokens"), help="token file; made from files if missing")
    add("--text", nargs="+", metavar="FOLDER", help="whose text files make it (default: Python's, /usr, /opt)")
    add("--output", type=output_file, default=Path("benchmarks/results/billion.json"), help="and .png")
    add("--draw", type=Path, nargs="+", metavar="FILE", help="measure nothing; draw these results in one picture")
    return parser


if __name__ == "__main__":
    run_cli(main)
