"""Dilated attention over the ranks of a launch: how it scales, what its exchange costs, exact attention beside it.

    torchrun --nproc_per_node=2 benchmarks/scaling.py [--parts check scaling peers trace] [--output …/scaling.json]

Forward and backward, causal, geometric pattern up to all rows. Times are medians over repeats of the slowest rank's
time; a repeat is as many runs as take about 0.1 s. One and many GPUs are measured in the same processes. Exposed
communication is the time with the exchange less that with what a rank receives replaced by rows of its own. Parts:

* ``check``: output and gradients of all ranks against one rank's
* ``scaling``: ``--weak-rows`` a GPU and ``--strong-rows`` in all, on each of ``--gpus``
* ``peers``: exact attention over all ranks (``exact_peers.py``) at ``--peer-rows``
* ``trace``: a profiler trace of the weak case over all ranks, and how much of the exchange it shows hidden

What fails is recorded with its error, the rest goes on; every result is written at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks import pictures
from benchmarks.exact_peers import PEERS
from benchmarks.pictures import save_picture
from benchmarks.record import environment
from benchmarks.scaling_jobs import Problem, difference_from_one_rank, profile_exchange, stubbed_exchange
from benchmarks.scaling_report import summary, table
from longnet_dist.checkpoint.run_folder import write_text
from longnet_dist.cli.program.exit_status import run_cli
from longnet_dist.comm.launch_env import LaunchEnvironment, process_group
from longnet_dist.comm.mesh import Mesh, MeshShape
from longnet_dist.errors import ConfigError

PARTS = ("check", "scaling", "peers", "trace")
REPEAT_SECONDS = 0.1

Variant = tuple[Callable[[], Any], Callable[[], AbstractContextManager[Any]]]
"""What is run, and under what it is run."""


def main(arguments: list[str] | None = None) -> None:
    """Measure as the command line says; every rank runs this."""
    options = _parser().parse_args(arguments)
    launch = LaunchEnvironment.read(os.environ)
    device = launch.device()
    launch.share_cores()
    timeout = timedelta(minutes=options.timeout_minutes)
    with process_group(launch, device, timeout):
        Benchmark(options, device, timeout).run()


@dataclass(frozen=True)
class Team:
    """The first ``size`` ranks; ``group`` is None for one. Others only wait."""

    size: int
    group: dist.ProcessGroup | None
    is_member: bool


class Benchmark:
    """All measurements of a launch, on one rank."""

    def __init__(self, options: argparse.Namespace, device: torch.device, timeout: timedelta) -> None:
        self.options, self.device = options, device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.sizes: list[int] = sorted({*(options.gpus or [1]), self.ranks})
        if any(self.ranks % size for size in self.sizes):
            raise ConfigError(f"--gpus must divide the {self.ranks} ranks, not {options.gpus}")
        self.teams = {size: self._team(size, timeout) for size in self.sizes}
        facts = environment() | {"command": shlex.join(["torchrun", f"--nproc_per_node={self.ranks}", *sys.argv])}
        if device.type == "cuda":
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        shape = {name: getattr(options, name) for name in ("heads", "dim", "base", "lean")}
        self.result: dict[str, Any] = {
            "environment": facts,
            "ranks": self.ranks,
            "shape": shape,
            "dtype": str(self.dtype),
        }

    def run(self) -> None:
        """All parts, those that a fault of others would spoil first."""
        for part in PARTS:
            if part in self.options.parts:
                began = time.monotonic()
                getattr(self, f"_{part}")()
                self.result[f"{part}_seconds"] = time.monotonic() - began
                self._write()
        if self.rank == 0:
            self.options.output.with_suffix(".md").write_text(table(self.result))
            print(table(self.result), flush=True)
            save_picture(pictures.scaling(self.result), self.options.output.with_suffix(".png"))

    def _check(self) -> None:
        problem = self._problem(self.options.check_rows, self.ranks)
        team = self.teams[self.ranks]

        def compare() -> dict[str, float]:
            assert team.group is not None
            return difference_from_one_rank(problem, team.group, self.rank, self.device, self.dtype)

        found = self._together(team, compare)
        if "error" not in found:
            found = {name: max(answer[name] for answer in found["answers"]) for name in ("out", "dq", "dk", "dv")}
        self.result["check"] = {"rows": problem.rows, "relative_difference": found}

    def _scaling(self) -> None:
        """Cases with few rows first: what they compile, the others use."""
        cases = {(self.options.weak_rows * size, size) for size in self.sizes}
        cases |= {(rows, size) for rows in self.options.strong_rows for size in self.sizes}
        self.result["cases"] = []
        for rows, size in sorted(cases):
            case = {"rows": rows, "gpus": size, **self._case(self._problem(rows, size), self.teams[size])}
            self.result["cases"].append(case)
            self._write()

    def _case(self, problem: Problem, team: Team) -> dict[str, Any]:
        """Milliseconds in every variant, and the traffic."""
        inputs = problem.inputs(self.rank, self.device, self.dtype) if team.is_member else []
        attend = partial(problem.attend, inputs, team.group)
        variants: dict[str, Variant] = {"overlapped": (attend, nullcontext)}
        if team.size > 1:
            variants["waited"] = (partial(attend, overlap=False), nullcontext)
            variants["stubbed"] = (attend, stubbed_exchange)
        return self._times(team, variants) | problem.traffic(self.device, self.dtype)

    def _peers(self) -> None:
        self.result["peers"] = []
        for rows in sorted(self.options.peer_rows):
            for name in PEERS:
                self.result["peers"].append({"name": name, "rows": rows, "gpus": self.ranks, **self._peer(name, rows)})
                self._write()

    def _peer(self, name: str, rows: int) -> dict[str, Any]:
        team = self.teams[self.ranks]
        assert team.group is not None
        like = torch.empty(0, device=self.device, dtype=self.dtype)
        with ExitStack() as stack:
            peer = PEERS[name](team.group, rows, self.options.heads, self.options.dim, like)
            made: list[Callable[[], Any]] = []
            failed = self._together(team, lambda: made.append(stack.enter_context(peer))).get("error")
            return {"exact": {"error": failed}} if failed else self._times(team, {"exact": (made[0], nullcontext)})

    def _trace(self) -> None:
        team, path = self.teams[self.ranks], self.options.output.with_suffix(f".rank{self.rank}.trace.json.gz")
        problem = self._problem(self.options.weak_rows * self.ranks, self.ranks)
        path.parent.mkdir(parents=True, exist_ok=True)

        def profile() -> dict[str, dict[str, float]]:
            inputs = problem.inputs(self.rank, self.device, self.dtype)
            problem.attend(inputs, team.group)
            return profile_exchange(lambda: problem.attend(inputs, team.group), path)

        self.result["trace"] = self._together(team, profile)

    def _times(self, team: Team, variants: dict[str, Variant]) -> dict[str, dict[str, Any]]:
        """Of each variant the median, least and most milliseconds of the slowest rank; or the error."""
        found = self._together(team, lambda: self._repeat(team, variants))
        if "error" in found:
            return dict.fromkeys(variants, found)
        return {name: _median_of_slowest([answer[name] for answer in found["answers"]]) for name in variants}

    def _repeat(self, team: Team, variants: dict[str, Variant]) -> dict[str, dict[str, Any]]:
        """Take turns, so that what changes over time changes all variants alike."""
        self._forget()
        longest, repeats = 0.0, self.options.repeats
        for run, changed in variants.values():
            with changed():
                for _ in range(2):
                    seconds = self._seconds(team, run, 1)  # the first compiles and chooses kernels
            longest = max(longest, *self._agree(team, seconds))
        runs = max(1, round(REPEAT_SECONDS / longest))
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(repeats if longest < 0.5 else min(3, repeats)):
            for name, (run, changed) in variants.items():
                with changed():
                    times[name].append(1000 * self._seconds(team, run, runs) / runs)
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return {name: {"ms": times[name], "runs": runs, "peak_memory_bytes": memory} for name in variants}

    def _seconds(self, team: Team, run: Callable[[], Any], runs: int) -> float:
        """Of ``runs`` runs that begin together on all ranks of the team."""
        self._agree(team, 0.0)
        if self.device.type != "cuda":
            began = time.perf_counter()
            for _ in range(runs):
                run()
            return time.perf_counter() - began
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(runs):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000

    def _agree(self, team: Team, *values: float) -> list[float]:
        """The largest of each value over the team, which has thereby met."""
        met = torch.tensor(values, dtype=torch.float64, device=self.device)
        if team.group is not None:
            dist.all_reduce(met, dist.ReduceOp.MAX, group=team.group)
        return met.tolist()

    def _together(self, team: Team, work: Callable[[], Any]) -> dict[str, Any]:
        """The answers of the team's members, known to all ranks; or the first error, whoever had it."""
        answer, error = None, None
        if team.is_member:
            try:
                answer = work()
            except Exception as caught:  # of a peer, or of a library beneath; the other measurements are worth having
                error = f"rank {self.rank}: {type(caught).__name__}: {caught}"[:1000]
        told: list[Any] = [None] * self.ranks
        dist.all_gather_object(told, (answer, error))
        errors = [error for _, error in told if error]
        return {"error": errors[0]} if errors else {"answers": [answer for answer, _ in told[: team.size]]}

    def _problem(self, rows: int, gpus: int) -> Problem:
        options = self.options
        return Problem(rows, gpus, options.heads, options.dim, options.base, options.lean)

    def _team(self, size: int, timeout: timedelta) -> Team:
        mesh = Mesh.build(MeshShape(self.ranks // size, size), timeout)
        return Team(size, mesh.sequence_group, mesh.data_rank == 0)

    def _forget(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _write(self) -> None:
        if self.rank == 0:
            output: Path = self.options.output
            output.parent.mkdir(parents=True, exist_ok=True)
            self.result["summary"] = summary(self.result)
            write_text(output, json.dumps(self.result, indent=1) + "\n")


def _median_of_slowest(answers: list[dict[str, Any]]) -> dict[str, Any]:
    slowest = [max(times) for times in zip(*(answer["ms"] for answer in answers), strict=True)]
    return {
        "ms": statistics.median(slowest),
        "least_ms": min(slowest),
        "most_ms": max(slowest),
        "repeats": len(slowest),
        "runs": answers[0]["runs"],
        "peak_memory_bytes": max(answer["peak_memory_bytes"] for answer in answers),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--gpus", type=int, nargs="+", help="numbers of GPUs beside all of them (default: 1)")
    add("--weak-rows", type=int, default=524288, help="rows a GPU (default %(default)s)")
    add("--strong-rows", type=int, nargs="*", default=[65536, 131072, 524288, 1048576], help="rows of all GPUs")
    add("--peer-rows", type=int, nargs="*", default=[131072, 524288])
    add("--check-rows", type=int, default=65536)
    add("--heads", type=int, default=12)
    add("--dim", type=int, default=64, help="of a head (default %(default)s)")
    add("--base", type=int, default=2048, help="shortest segment (default %(default)s)")
    add("--lean", action="store_true", help="as a training step does, 16 bytes a number of q, not 20")
    add("--repeats", type=int, default=7)
    add("--timeout-minutes", type=float, default=5.0, help="of a collective (default %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("benchmarks/results/scaling.json"),
        help="and .md, .png, .rank*.trace.json.gz",
    )
    return parser


if __name__ == "__main__":
    run_cli(main)
