"""Dilated attention on one GPU with several Tritons: errors and times, each in processes of its own.

    python benchmarks/triton_versions.py --triton FOLDER ... [--turns 10] [--shapes 24] [--output FILE.json]

Compares the Triton that Python finds by itself with those in the folders (``pip install --no-deps --target FOLDER
triton==...``). Torch stays the installed one. Errors are those of ``attention_accuracy.py``: random ragged shapes,
output and all gradients against the definition in float64, as multiples of dense FlashAttention-2's. Times are medians
of forward and backward at 1,048,576 tokens in bf16, causal, at 12 heads of 64 and 6 heads of 128; versions take turns,
because a card grows warm. ``portable`` is the installed Triton without the kernels for Hopper.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.runs import import_paths
from benchmarks.turns import Variant, by_turns, summary

ROOT = Path(__file__).resolve().parents[1]
CASES = ("causal", "D 128 causal")
PORTABLE = "portable"
ALLOWED = 1.5
"""Errors as multiples of dense FlashAttention-2's, more than the 1.38 that Triton 3.6 ever reached."""


def errors(shapes: int, processes: int) -> dict[str, Any]:
    """Return the errors of random shapes, several at a time, because most of the time goes into compiling."""
    from benchmarks.attention_accuracy import compare

    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        found = list(pool.imap_unordered(partial(compare, backend="triton"), range(shapes)))
    return {"shapes": sorted(found, key=lambda one: one["seed"]), "worst_ratio": max(one["ratio"] for one in found)}


def worker(part: str, output: Path, shapes: int, processes: int) -> None:
    """Say what the Triton that this process finds would run, and for ``errors`` how exact it is."""
    import torch
    import triton

    from benchmarks.record import environment
    from longnet_dist.attention.kernels.hopper import support
    from longnet_dist.attention.kernels.registry import describe_kernels

    if part == PORTABLE:
        support.FIRST_RELEASE = (sys.maxsize, 0)  # no Triton is new enough
    result: dict[str, Any] = {"environment": {**environment(), "triton": triton.__version__}}
    choices = {dim: describe_kernels(torch.device("cuda"), torch.bfloat16, dim) for dim in (64, 128)}
    result["kernels"] = {dim: [choice.forward, choice.backward, choice.reason] for dim, choice in choices.items()}
    if part == "errors":
        result["errors"] = errors(shapes, processes)
    output.write_text(json.dumps(result))


def run(folder: Path | None, part: str, cache: Path, shapes: int = 0, processes: int = 1) -> dict[str, Any]:
    """Start a worker with the Triton of ``folder``, or the installed one, and return its result."""
    paths = import_paths(*([folder] if folder else []))
    name = folder.name if folder else "installed"
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(cache / name)}
    output = cache / f"{name}-{part}.json"
    command = [sys.executable, __file__, "--worker", part, "--output", str(output), "--shapes", str(shapes)]
    subprocess.run([*command, "--processes", str(processes)], env=environment, check=True)
    return dict(json.loads(output.read_text()))


def table(found: list[dict[str, Any]]) -> str:
    """Return one line for each version: times, their ratio to those of the first, and the worst error."""
    lines = [f"{'Triton':18}{'':10}" + "".join(f"{case:>34}" for case in CASES) + f"{'worst error':>13}"]
    for one in found:
        cells = ""
        for case in CASES:
            now = one["median"][case]
            ratio = now.get("median_ratio_of_turns", 1.0)
            cells += f"{now['forward_ms']:12.2f} + {now['backward_ms']:6.2f} ms {ratio:7.3f} x"
        worst = f"{one['errors']['worst_ratio']:13.2f}" if "errors" in one else ""
        lines.append(f"{one['triton']:18}{one['variant']:10}{cells}{worst}")
    return "\n".join(lines)


def compare_versions(folders: list[Path | None], turns: int, shapes: int, processes: int) -> list[dict[str, Any]]:
    """Measure every version, errors first and at the same time, then times by turns and alone."""
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch)
        with ThreadPoolExecutor() as threads:
            share = max(1, processes // len(folders))
            found = list(threads.map(lambda one: run(one, "errors", cache, shapes, share), folders))
        found.append(run(None, PORTABLE, cache))
        names = [*(folder.name if folder else "installed" for folder in folders), PORTABLE]
        variants = [Variant(name, ROOT, folder) for name, folder in zip(names[:-1], folders, strict=True)]
        rows = by_turns([*variants, Variant(PORTABLE, ROOT, portable=True)], CASES, turns, cache)
    medians = summary(rows)
    for name, one in zip(names, found, strict=True):
        one |= {"variant": name, "triton": one["environment"]["triton"]}
        one["median"] = {case: medians[case][name] for case in CASES}
        one["turns"] = [row for row in rows if row["variant"] == name]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; status 1 if an error is larger than allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", type=Path, nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--shapes", type=int, default=24)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/triton_versions.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(options.worker, options.output, options.shapes, options.processes)
        return 0
    folders = [None, *(folder.resolve() for folder in options.triton)]
    found = compare_versions(folders, options.turns, options.shapes, options.processes)
    command = " ".join(["python benchmarks/triton_versions.py", *sys.argv[1:]])
    note = "torch is the installed one with every Triton; the newest torch was not run on a GPU"
    options.output.write_text(json.dumps({"command": command, "note": note, "versions": found}, indent=1) + "\n")
    print(table(found))
    return int(any(one["errors"]["worst_ratio"] > ALLOWED for one in found if "errors" in one))


if __name__ == "__main__":
    sys.exit(main())
