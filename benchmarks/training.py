"""Training on one GPU: speed, the longest sequence, what each way to save memory costs and changes, dense beside it.

    python benchmarks/training.py --parts throughput --output benchmarks/results/training_h100.json
    python benchmarks/training.py --parts longest baseline curves --output benchmarks/results/training_h100.json

* ``throughput``: the median step of models and lengths, with every memory option of its own.
* ``gains``: time and memory of each option beside those of ``selective``, also as a table in ``.md``.
* ``longest``: the longest sequence of whole training steps, by doubling and halving, to ``--resolution`` rows. The
  first step compiles and pins memory, the second is timed.
* ``baseline``: the same model with dense attention (cuDNN), checkpointed by torch and compiled, beside it.
* ``curves``: the losses of 50 steps with and without each option, from one seed.

Every measurement is a process of its own and is written at once; none begins that ``--seconds`` do not leave time for.
A run that was cut goes on with the same ``--output``: what is there is not measured again. MFU counts model FLOPs alone
(``longnet_dist/estimate/model_cost.py``).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks import pictures
from benchmarks.pictures import save_picture
from benchmarks.record import environment, output_file
from benchmarks.trials import Trial, isolated
from longnet_dist.checkpoint.run_folder import write_text
from longnet_dist.cli.program.exit_status import run_cli
from longnet_dist.data.prepare import default_token_file

PARTS = ("throughput", "gains", "longest", "baseline", "curves")
SELECTIVE = ("train.activation_checkpointing=selective",)
FULL = ("train.activation_checkpointing=full",)
HOST = ("train.offload_activations=true",)
ROPE = ("model.positions=rope",)  # xPos spans no dense attention of this length
BIG_MODEL = ("model.name=1.3b", *SELECTIVE, *HOST)
VOCABULARY = ("model.vocab_size=100277",)
# Llama-3-8B's sizes; its three matrices of 14,336 in the feed-forward have as many weights as two of 21,504.
LLAMA = (
    "model.dim=4096", "model.layers=32", "model.heads=32", "model.kv_heads=8", "model.ffn_dim=21504",
    "model.vocab_size=128256", *ROPE, *FULL, *HOST, "deepspeed.offload_optimizer=true",
)  # fmt: skip
OPTIONS = {
    "plain": ("train.activation_checkpointing=none", "train.compile=false"),
    "plain again": ("train.activation_checkpointing=none", "train.compile=false"),  # what the order of sums changes
    "compiled": ("train.activation_checkpointing=none", "train.compile=true"),
    "selective": (*SELECTIVE, "train.compile=false"),
    "full": (*FULL, "train.compile=false"),
    "tiles": (*SELECTIVE, "train.compile=false", "train.feed_forward_tile=3000"),
    "projections": (*SELECTIVE, "train.compile=false", "train.cache_qkv=6"),
    "host": (*FULL, *HOST, "train.compile=false"),
    "optimizer on the host": (*SELECTIVE, "train.compile=false", "deepspeed.offload_optimizer=true"),
}
GAINS = {
    "selective": SELECTIVE,
    "none": ("train.activation_checkpointing=none",),
    "full": FULL,
    "12 projections": (*SELECTIVE, "train.cache_qkv=12"),
    "host": (*SELECTIVE, *HOST),
    "host, 12 projections, 6 there": (
        *SELECTIVE, *HOST, "train.cache_qkv=12", "train.offload_qkv=6",
    ),
    "no tiles": (*SELECTIVE, "train.feed_forward_tile=null"),
    "not compiled": (*SELECTIVE, "train.compile=false"),
    "optimizer on the host": (*SELECTIVE, "deepspeed.offload_optimizer=true"),
    "100,277 ids": (*SELECTIVE, "model.vocab_size=100277"),
    "100,277 ids, logits whole": (*SELECTIVE, "model.vocab_size=100277", f"model.loss_chunk={2**30}"),
}  # fmt: skip


class Benchmark:
    """All measurements of a run; ``self.result`` is the file's content."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.started, self.writing = options, time.monotonic(), Lock()
        self.data = str(options.data or default_token_file(Path("data")))
        self.result: dict[str, Any] = {"runs": [], "points": []}
        if options.output.exists():
            self.result = json.loads(options.output.read_text())
        run = {"command": shlex.join(["python", "benchmarks/training.py", *sys.argv[1:]]), "environment": environment()}
        self.result["runs"].append(run)

    def run(self) -> None:
        """Measure the parts in the order given."""
        for part in self.options.parts:
            getattr(self, part)()

    def throughput(self) -> None:
        """Models and lengths, and the paper's model with other tiles and modes."""
        size, rows = self.options.settings, self.options.rows
        for tile in self.options.tiles:
            self._point("throughput", f"tile {tile}", rows, (*size, *SELECTIVE, f"train.feed_forward_tile={tile}"))
        tiled = (*size, f"train.feed_forward_tile={self.options.tiles[0]}")
        self._point("throughput", "not compiled", rows, (*tiled, *SELECTIVE, "train.compile=false"))
        self._point("throughput", "full", rows, (*tiled, *FULL))
        self._point("throughput", "selective, host", rows, (*tiled, *SELECTIVE, *HOST))
        for kept, resident in ((5, 0), (12, 0), (12, 3), (12, 4), (11, 4)):
            settings = (*tiled, *SELECTIVE, f"train.cache_qkv={kept}")
            settings += (*HOST, f"train.resident_blocks={resident}") * bool(resident)
            name = f"{kept} projections" + f", {12 - resident} blocks on the host" * bool(resident)
            self._point("throughput", name, rows, settings)
        for mode in ("none", "selective"):
            self._point("throughput", mode, rows // 4, (*size, f"train.activation_checkpointing={mode}"))
        if "1.3b" in self.options.models:
            tile = ("train.feed_forward_tile=32768",)
            for kept, waiting in ((18, 6), (12, 0), (0, 0)):
                settings = (*BIG_MODEL, *tile, f"train.cache_qkv={kept}")
                settings += (f"train.offload_qkv={waiting}",) * bool(waiting)
                name = f"1.3b, {kept} projections" + f", {waiting} on the host" * bool(waiting)
                self._point("throughput", name, rows // 4, settings, warmup=2, steps=3)

    def gains(self) -> None:
        """Each option against ``selective``."""
        rows, size = self.options.gain_rows, self.options.settings
        tile = f"train.feed_forward_tile={self.options.tiles[0]}"
        for name, settings in GAINS.items():
            self._point("gains", name, rows, (*size, tile, *settings), warmup=2, steps=3)
        write_text(self.options.output.with_suffix(".md"), gains_table(self.result["points"]))

    def longest(self) -> None:
        """The models asked for, each with all that saves memory."""
        models = {
            "paper": (*self.options.settings, *FULL, *HOST),
            "vocabulary": (*self.options.settings, *FULL, *HOST, *VOCABULARY),
            "8b": LLAMA,
        }
        for name, settings in models.items():
            if name in self.options.models:
                self._longest(name, (*settings, f"train.feed_forward_tile={self.options.tiles[0]}"))

    def baseline(self) -> None:
        """Dilated and dense, the same options otherwise, at lengths that dense attention can bear."""
        settings = (*self.options.settings, *FULL, *ROPE, f"train.feed_forward_tile={self.options.tiles[0]}")
        for rows in self.options.baseline_rows:
            for dense in (False, True):
                self._point("baseline", "dense" if dense else "dilated", rows, settings, dense, warmup=1, steps=1)
        if "dense" in self.options.models:
            self._longest("dense", settings, dense=True)

    def curves(self) -> None:
        """Losses with each option, and how far they are from those without."""
        words = (*self.options.settings, f"train.precision={self.options.curve_precision}", "train.warmup_steps=10")
        words += ("deepspeed.zero_stage=1",)
        plain = None

        def curve(name: str) -> dict[str, Any] | None:
            given = self.options.curve_rows, (*words, *OPTIONS[name])
            return self._point("curves", name, *given, warmup=0, steps=self.options.curve_steps)

        with ThreadPoolExecutor(self.options.parallel) as pool:
            points = list((pool.map if self.options.parallel > 1 else map)(curve, OPTIONS))
        for name, point in zip(OPTIONS, points, strict=True):
            if point is None or "losses" not in point:
                continue
            plain = plain or point["losses"]
            point["difference"] = max(abs(a - b) / b for a, b in zip(point["losses"], plain, strict=True))
            print(f"{name}: largest relative difference {point['difference']:.1e}", flush=True)
            self._write()

    def _longest(self, name: str, settings: tuple[str, ...], dense: bool = False) -> None:
        """Double from ``--start`` until a step fails (or halve until one succeeds), then halve the gap."""
        options = self.options
        fits, fails, rows = 0, None, options.start
        while rows >= options.resolution and (fails is None or fails - fits > options.resolution):
            point = self._point("longest", name, rows, settings, dense, warmup=1, steps=1)
            if point is None:
                return
            if "error" in point:
                fails = rows
            else:
                fits = rows
            middle = (fits + fails) // 2 if fails else min(2 * rows, options.most)
            rows = middle // options.resolution * options.resolution
            if rows == fits:
                return

    def _point(
        self,
        part: str,
        name: str,
        rows: int,
        settings: tuple[str, ...],
        dense: bool = False,
        warmup: int = 3,
        steps: int = 5,
    ) -> dict[str, Any] | None:
        """A trial's result, measured now or before; None if no time is left for it."""
        trial = Trial(name, rows, self.data, settings, dense, warmup, steps)
        for point in self.result["points"]:
            if point["part"] == part and all(point[key] == value for key, value in trial.key.items()):
                return point
        if self.options.only and name not in self.options.only:
            return None
        left = self.options.seconds - (time.monotonic() - self.started)
        if left < self.options.least_seconds:
            print(f"{part}, {name}: no time left", flush=True)
            return None
        limit = min(left, self.options.trial_seconds)
        commit = self.result["runs"][-1]["environment"]["commit"]
        point = {"part": part, "commit": commit, **trial.key, **isolated(trial, limit)}
        if limit == left and str(point.get("error", "")).startswith("no answer"):
            print(f"{part}, {name}: cut by the end of the time", flush=True)  # which says nothing of the trial
            return None
        with self.writing:
            self.result["points"].append(point)
            self._write()
            print(_line(point), flush=True)
        return point

    def _write(self) -> None:
        output: Path = self.options.output
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(self.result, indent=1) + "\n")
        save_picture(pictures.training(self.result), output.with_suffix(".png"))


def gains_table(points: list[dict[str, Any]]) -> str:
    """The measurements of ``gains`` as Markdown; times are relative to the first of their length."""
    lines = ["| option | tokens | s a step | × `selective` | peak GiB |", "|---|---|---|---|---|"]
    found = [point for point in points if point["part"] == "gains"]
    plain = {p["rows"]: p["median_seconds"] for p in found if p["name"] == "selective" and "median_seconds" in p}
    for point in found:
        cells = [point["name"], f"{point['rows']:,}"]
        if "error" in point:
            cells += [point["error"], "", ""]
        else:
            seconds, memory = point["median_seconds"], point.get("peak_allocated_bytes", 0) / 2**30
            ratio = f"{seconds / plain[point['rows']]:.3f}" if point["rows"] in plain else ""
            cells += [f"{seconds:.3f}", ratio, f"{memory:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _line(point: dict[str, Any]) -> str:
    head = f"{point['part']:>10} {point['name']:>22} {point['rows']:>10,} tokens"
    if "error" in point:
        return f"{head}  {point['error']}  {point.get('said', '')}".rstrip()
    mfu = "" if point["mfu"] is None else f"  MFU {point['mfu']:.1%}"
    memory = point.get("peak_allocated_bytes", 0) / 2**30, point.get("peak_reserved_bytes", 0) / 2**30
    return (
        f"{head}  {point['median_seconds']:>8.3f} s  {point['tokens_per_second']:>11,.0f} tokens/s"
        f"  {memory[0]:.1f} ({memory[1]:.1f}) GiB  loss {point['losses'][-1]:.4f}{mfu}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--models", nargs="*", default=["paper", "vocabulary", "1.3b"], help="also 8b, dense: see the source")
    add("--only", nargs="*", default=[], help="names of measurements, as printed (default: all)")
    add("--parallel", type=int, default=1, help="curves at once, each of which must fit (default %(default)s)")
    add("--settings", nargs="*", default=[], metavar="key=value", help="over the paper's model")
    add("--rows", type=int, default=2**20, help="of throughput (default %(default)s)")
    add("--gain-rows", type=int, default=2**18, help="of gains (default %(default)s)")
    add("--tiles", type=int, nargs="+", default=[65536, 16384, 262144], help="of throughput; the first for the others")
    add("--start", type=int, default=2**22, help="of the longest sequence (default %(default)s)")
    add("--most", type=int, default=2**26, help="rows to try: the host must hold 2 bytes · E · layers of each")
    add("--resolution", type=int, default=2**18, help="of the longest sequence (default %(default)s)")
    add("--baseline-rows", type=int, nargs="+", default=[131072, 262144])
    add("--curve-rows", type=int, default=32768)
    add("--curve-steps", type=int, default=50)
    add("--curve-precision", choices=("fp32", "bf16"), default="bf16")
    add("--seconds", type=float, default=530.0, help="of the whole program (default %(default)s)")
    add("--trial-seconds", type=float, default=240.0, help="of one measurement (default %(default)s)")
    add("--least-seconds", type=float, default=30.0, help="begin none with less time left (default %(default)s)")
    add("--data", type=Path, help="token file of bytes (default: the standard library's source)")
    add("--output", type=output_file, default=Path("benchmarks/results/training.json"), help="and .png")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Measure as the command line says."""
    Benchmark(_parser().parse_args(arguments)).run()


if __name__ == "__main__":
    run_cli(main)
