"""Check and time GPU kernels that were compiled but never ran: see README.md beside this file.

    python benchmarks/candidates/measure.py --new TREE --loop TREE --output FILE.json [--budget 420] [--only TEXT]

Every candidate is checked in a process of its own, so that one that hangs or crashes costs little; those whose errors
are small are timed, a process for each package, pass and head dim. The result is written after every step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to run as a file, too

from benchmarks.candidates.rows import candidates, name_of

ROOT = Path(__file__).resolve().parents[2]
CHECK_SECONDS = 150.0
TIME_SECONDS = 120.0


class Measurement:
    """All candidates of a run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.started = options, time.monotonic()
        self.trees = {"base": ROOT, "new": options.new, "loop": options.loop}
        self.all = [c for c in candidates() if options.only in name_of(c) and self.trees[c["package"]]]

    def run(self) -> None:
        """Check all, time the good ones, print a table."""
        with ThreadPoolExecutor(self.options.workers) as pool:
            what = "compile" if self.options.checked else "check"
            futures = {pool.submit(self._call, what, c, c["package"], CHECK_SECONDS): c for c in self.all}
            for future in as_completed(futures):
                self._checked(futures[future], *future.result())
        good = [c for c in self.all if c["check"].get("bad") == {}]
        for key in sorted({_group(c) for c in good}):
            self._time([c for c in good if _group(c) == key])
        for candidate in good:
            times = candidate.get("time", {})
            cells = [f"{case} {ms:7.2f} ms {rate:4.0f} TFLOP/s" for case, (ms, rate) in times.items()]
            print(f"{name_of(candidate):64}" + "   ".join(cells))

    def _checked(self, candidate: dict[str, Any], results: list[dict[str, Any]], failure: str) -> None:
        candidate["check"] = results[0] if results and not failure else {"failed": failure or "it printed no result"}
        self._write()
        print(f"{time.monotonic() - self.started:6.0f} s  {name_of(candidate):64}{candidate['check']}", flush=True)

    def _time(self, group: list[dict[str, Any]]) -> None:
        """A process that dies is started again without the candidate that it died of."""
        while group and self._left() > 15:
            results, failure = self._call("time", group, group[0]["package"], TIME_SECONDS)
            for result in results:
                number = result.pop("id")
                candidate = next(c for c in group if c["id"] == number)
                candidate.setdefault("time", {}).update(result)
            self._write()
            if not failure:
                return
            rest = [c for c in group if "time" not in c]
            print(f"timing failed: {failure}, at {name_of(rest[0]) if rest else 'a later case'}", flush=True)
            group = rest[1:]

    def _call(self, what: str, given: object, package: str, seconds: float) -> tuple[list[dict[str, Any]], str]:
        """The results of a worker, and why it failed if it did."""
        command = [sys.executable, str(ROOT / "benchmarks" / "candidates" / "worker.py"), what, json.dumps(given)]
        paths = os.pathsep.join([str(self.trees[package]), os.environ.get("PYTHONPATH", "")])
        patience = max(5.0, min(seconds, self._left()))
        failure = ""
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(self.options.cache)},
        ) as process:
            try:
                out, err = process.communicate(timeout=patience)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                failure = f"no answer in {patience:.0f} s"
        if process.returncode and not failure:
            failure = "\n".join(err.strip().splitlines()[-20:]) or f"status {process.returncode}"
        return [json.loads(line[7:]) for line in out.splitlines() if line.startswith("RESULT ")], failure

    def _left(self) -> float:
        return float(self.options.budget) - (time.monotonic() - self.started)

    def _write(self) -> None:
        self.options.output.write_text(json.dumps(self.all, indent=1) + "\n")


def _group(candidate: dict[str, Any]) -> tuple[str, str, int]:
    return candidate["package"], candidate["kind"], candidate["dim"]


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--new", type=Path, help="a tree with no_rescaling.patch applied")
    add("--loop", type=Path, help="a tree with both patches applied")
    add("--output", type=Path, required=True)
    add("--budget", type=float, default=420.0, help="seconds in all (default %(default)s)")
    add("--only", default="", help="candidates whose name has this text")
    add("--checked", action="store_true", help="all were found right before: only compile and time them")
    add("--workers", type=int, default=14, help="checks at once (default %(default)s)")
    add("--cache", type=Path, default=Path("/tmp/kernel_cache"), help="of compiled kernels (default %(default)s)")
    Measurement(parser.parse_args()).run()


if __name__ == "__main__":
    main()
