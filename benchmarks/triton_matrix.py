"""Compile every kernel with every Triton, for Ampere and Hopper, without a GPU: registers and spills.

    pip install --no-deps --target /tmp/triton-3.9.0 triton==3.9.0
    python benchmarks/triton_matrix.py --triton /tmp/triton-3.9.0 [FOLDER ...] [--installed] [--output FILE.json]

Each FOLDER holds a Triton; ``--installed`` adds the one that Python finds by itself, and is the default. Writes
``benchmarks/results/triton_matrix.json`` and ends with status 1 where a kernel does not compile or spills where it
must not. One process each, because only one Triton can be imported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.runs import import_paths

ROOT = Path(__file__).resolve().parents[1]
CASES = ((80, 64), (80, 128), (90, 64), (90, 128))
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that a program of a compute capability can have."""
MOST_SPILLED = 64
"""Bytes that a thread of a Hopper kernel may store to local memory, all of them outside the inner loops."""
MOST_SPILLED_ROW_WISE = 8
"""The same of a row-wise kernel, wherever."""


def build(folder: Path | None, capability: int, dim: int) -> dict[str, Any]:
    """Compile all kernels in a process of its own.

    Args:
        folder: of a Triton; None for the one that Python finds by itself.
        capability: compute capability times ten.
        dim: head dim.

    Returns:
        ``triton, capability, dim, builds`` and, where the process failed, ``error``.
    """
    paths = import_paths(*([folder] if folder else []))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "builds.json")
        environment |= {"TRITON_CACHE_DIR": scratch, "TRITON_DUMP_PTXAS_LOG": "1", "PYTHONPATH": paths}
        command = [sys.executable, str(ROOT / "benchmarks/kernel_builds.py"), str(capability), str(dim), str(output)]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return dict(json.loads(output.read_text()))
    errors = [line for line in answer.stderr.splitlines() if "Error" in line]
    where = folder.name if folder else "installed"
    return {"triton": where, "capability": capability, "dim": dim, "builds": [], "error": (errors or ["?"])[0]}


def faults(case: dict[str, Any]) -> list[str]:
    """Say what must not be in the builds of a case."""
    if "error" in case:
        return [case["error"]]
    found = []
    names = {one["kernel"] for one in case["builds"]}
    if case["capability"] == 90:
        expected = {"hopper_backward_kernel", *(["hopper_forward_kernel"] if case["dim"] == 128 else [])}
        found += [f"{name} was not compiled" for name in sorted(expected - names)]
    for one in case["builds"]:
        name = one["kernel"]
        most = MOST_SPILLED if name.startswith("hopper_") else MOST_SPILLED_ROW_WISE
        if one["spill_store_bytes"] > most and (one["part"] != "attention" or name.startswith("hopper_")):
            found.append(f"{name} spills {one['spill_store_bytes']} bytes")
        if one["spills_in_inner_loops"] and name.startswith("hopper_"):
            found.append(f"{name} spills in its inner loops")
        if one["serialized"] and name.startswith("hopper_"):
            found.append(f"{name} waits for every matrix product")
        if one["shared_bytes"] > SHARED_MEMORY[case["capability"]]:
            found.append(f"{name} takes {one['shared_bytes']} bytes of shared memory")
    return found


def line(case: dict[str, Any]) -> str:
    """Return a case as a line of the table."""
    hopper = [one for one in case["builds"] if one["kernel"].startswith("hopper_")]
    portable = [one for one in case["builds"] if not one["kernel"].startswith("hopper_")]
    cells = [f"{case['triton']:12} sm_{case['capability']} D {case['dim']:<4}"]
    for name, group in (("portable", portable), ("hopper", hopper)):
        if group:
            bytes_, inner = (max(x[key] for x in group) for key in ("spill_store_bytes", "spills_in_inner_loops"))
            cells.append(f"{name}: {len(group):2} kernels, at most {bytes_:3} bytes spilled, {inner} in inner loops")
    return " | ".join([*cells, *(faults(case) or ["pass"])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile as the command line says; return the status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", type=Path, nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--installed", action="store_true")
    parser.add_argument("--cases", nargs="+", default=[f"{c}x{d}" for c, d in CASES], help="capability x head dim")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/triton_matrix.json")
    options = parser.parse_args(arguments)
    folders: list[Path | None] = [None] if options.installed or not options.triton else []
    cases, failed = [], False
    for folder in [*folders, *options.triton]:
        for pair in options.cases:
            case = build(folder and folder.resolve(), *map(int, pair.split("x")))
            case["faults"] = faults(case)
            failed |= bool(case["faults"])
            cases.append(case)
            print(line(case), flush=True)
            options.output.write_text(json.dumps({"cases": cases}, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
