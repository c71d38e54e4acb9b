"""Dilated attention of several checkouts, or with several Tritons, on one GPU by turns.

    python benchmarks/turns.py NAME=CHECKOUT[:FOLDER] ... [--turns 10] [--only CASE ...] [--output FILE.json]

For before and after a change: ``before=OTHER_CHECKOUT after=.``. FOLDER holds another Triton (``pip install --no-deps
--target FOLDER triton==...``). Every variant is a process that stays, and measures a case of ``attention.py`` of its
own checkout when its turn comes, because a card grows warm and slower within minutes. Ratios are to the first variant:
of the medians, of the minima, and the median of the ratios of each turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment, output_file
from benchmarks.runs import import_paths

CASES = ("causal", "D 128 causal", "paper pattern")
TIMES = ("forward_ms", "backward_ms", "both_ms")
MARK = "answer: "
WORKER = f"""
import json, sys
import torch, triton
from benchmarks.attention import CASES, measure

if sys.argv[1:] == ["portable"]:
    from longnet_dist.attention.kernels.hopper import support
    support.FIRST_RELEASE = (sys.maxsize, 0)  # no Triton is new enough
cases = {{case.name: case for case in CASES}}
for line in sys.stdin:
    found = measure(cases[line.strip()], "triton")
    print({MARK!r} + json.dumps(found | {{"triton": triton.__version__}}), flush=True)
    torch.cuda.empty_cache()
"""


@dataclass(frozen=True)
class Variant:
    """What a worker measures: a checkout, with the Triton of a folder or the installed one."""

    name: str
    checkout: Path
    triton: Path | None = None
    portable: bool = False
    """Whether the kernels for Hopper are left out."""


class Worker:
    """A process that measures one variant when asked."""

    def __init__(self, variant: Variant, cache: Path | None = None) -> None:
        variables = os.environ | {"PYTHONPATH": import_paths(*filter(None, (variant.triton, variant.checkout)))}
        if cache is not None:
            variables["TRITON_CACHE_DIR"] = str(cache / variant.name)
        self.variant = variant
        command = [sys.executable, "-c", WORKER, *(["portable"] if variant.portable else [])]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=variables, cwd=variant.checkout, stdin=pipe, stdout=pipe, text=True
        )

    def ask(self, case: str) -> None:
        """Have a case measured; :meth:`answer` waits for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What ``measure`` of attention.py returns, with the version of Triton.

        Raises:
            RuntimeError: the process ended.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                found: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return found
        raise RuntimeError(f"the worker of {self.variant.name!r} ended with status {self._process.wait()}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def by_turns(
    variants: Sequence[Variant], cases: Sequence[str], turns: int, cache: Path | None = None
) -> list[dict[str, Any]]:
    """Rows ``turn, variant, case, triton, forward_ms, backward_ms, both_ms, gpu``.

    All variants compile first, at the same time. Then every turn measures each case with one variant after another,
    every other turn in the reverse order.

    Args:
        cache: folder for Triton's caches, one a variant; None for the cache of the user.
    """
    workers = [Worker(variant, cache) for variant in variants]
    try:
        for case in cases:
            for worker in workers:
                worker.ask(case)
        for _ in cases:
            for worker in workers:
                worker.answer()
        rows = []
        for turn in range(turns):
            for case in cases:
                for worker in workers[:: -1 if turn % 2 else 1]:
                    worker.ask(case)
                    found = worker.answer()
                    kept = {key: found[key] for key in ("triton", *TIMES, "gpu")}
                    rows.append({"turn": turn, "variant": worker.variant.name, "case": case, **kept})
        return rows
    finally:
        for worker in workers:
            worker.close()


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each case and variant: medians of the times, least ``both_ms``, and its ratios to the first variant's."""
    found: dict[str, dict[str, Any]] = {}
    first = rows[0]["variant"]
    for case in dict.fromkeys(row["case"] for row in rows):
        found[case] = {}
        for variant in dict.fromkeys(row["variant"] for row in rows):
            own = [row for row in rows if (row["case"], row["variant"]) == (case, variant)]
            one: dict[str, Any] = {key: round(statistics.median(row[key] for row in own), 3) for key in TIMES}
            one["least_both_ms"] = round(min(row["both_ms"] for row in own), 3)
            if variant == first:
                base, turns = one, {row["turn"]: row["both_ms"] for row in own}
            else:
                one["ratio_of_medians"] = round(one["both_ms"] / base["both_ms"], 4)
                one["ratio_of_least"] = round(one["least_both_ms"] / base["least_both_ms"], 4)
                ratios = [row["both_ms"] / turns[row["turn"]] for row in own]
                one["median_ratio_of_turns"] = round(statistics.median(ratios), 4)
            found[case][variant] = one
    return found


def variant_of(word: str) -> Variant:
    """Parse ``NAME=CHECKOUT[:FOLDER]``."""
    name, _, paths = word.partition("=")
    checkout, _, folder = paths.partition(":")
    if not name or not checkout:
        raise argparse.ArgumentTypeError(f"a variant is NAME=CHECKOUT or NAME=CHECKOUT:FOLDER, not {word!r}")
    return Variant(name, Path(checkout).resolve(), Path(folder).resolve() if folder else None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", type=variant_of, metavar="NAME=CHECKOUT[:FOLDER]")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--only", nargs="+", default=list(CASES), metavar="CASE")
    parser.add_argument("--output", type=output_file, default=Path("turns.json"))
    options = parser.parse_args(arguments)
    rows = by_turns(options.variants, options.only, options.turns)
    command = shlex.join(["python", "benchmarks/turns.py", *sys.argv[1:]])
    result = {"command": command, "environment": environment(), "summary": summary(rows), "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
