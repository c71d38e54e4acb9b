"""Seconds from the start of ``longnet train`` to the end of its first step: with nothing compiled before, and again.

    python benchmarks/first_step.py [key=value ...] --output benchmarks/results/first_step_h200.json

A run of ``--steps`` steps starts ``--rounds`` times with an empty folder for compiled code, and after each again with
what the first left there. ``--imports`` lists the modules whose import takes longest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment, output_file
from longnet_dist.ops.compile_cache import FOLDERS

_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|(\s+)(\S+)")


def main(arguments: list[str] | None = None) -> None:
    """Measure as the command line says."""
    options = _parser().parse_intermixed_args(arguments)
    result: dict[str, Any] = {"environment": environment(), "settings": options.settings, "new": [], "again": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("new", "again"):
                result[name].append(first_step(options, Path(folder)))
                print(f"{name}: {json.dumps(result[name][-1])}", flush=True)
    for name in ("new", "again"):
        seconds = [run["first_step_seconds"] for run in result[name]]
        print(f"{name}: first step after {statistics.median(seconds):.1f} s (median of {len(seconds)})")
    if options.imports:
        result["imports"] = slowest_imports(options.imports)
        for module, seconds in result["imports"].items():
            print(f"{seconds:7.3f} s  {module}")
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def first_step(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Run a few steps with compiled code in ``folder``; seconds until the first and the last step, from the start."""
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    words = [
        *options.settings, f"train.steps={options.steps}", f"train.output_dir={output}", "train.validate_every=0",
        "train.checkpoint_every=0", f"train.compile_cache={folder / 'compiled'}", "train.loggers=[jsonl]",
        "train.warmup_steps=0",
    ]  # fmt: skip
    variables = {name: value for name, value in os.environ.items() if name not in FOLDERS}
    command = [sys.executable, "-m", "longnet_dist", "train", options.config, *words]
    start, times, metrics = time.perf_counter(), list[float](), output / "metrics.jsonl"
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            times += [time.perf_counter() - start] * (done - len(times))
            time.sleep(0.02)
        if process.returncode or not times:
            log.seek(0)
            raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}:\n{log.read()[-4000:]}")
    seconds = time.perf_counter() - start
    return {"first_step_seconds": times[0], "last_step_seconds": times[-1], "process_seconds": seconds}


def slowest_imports(number: int) -> dict[str, float]:
    """Seconds that the import of each top module takes in a rank, by itself and all below it; the slowest first."""
    code = "import longnet_dist.train.loop"
    command = [sys.executable, "-X", "importtime", "-c", code]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    found: dict[str, float] = {}
    for match in filter(None, map(_IMPORT.match, lines)):
        found[match[4]] = int(match[2]) / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1])[:number])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("settings", nargs="*", metavar="key=value", help="settings of the run")
    add("--config", default="paper")
    add("--steps", type=int, default=3)
    add("--rounds", type=int, default=1)
    add("--imports", type=int, default=0, metavar="n", help="list the n slowest imports")
    add("--output", type=output_file, default=Path("benchmarks/results/first_step.json"))
    return parser


if __name__ == "__main__":
    main()
