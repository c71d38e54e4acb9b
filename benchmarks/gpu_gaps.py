"""When a GPU waits for its host in the traces of ``train.profile``: idle time of a step, and what the host did then.

    longnet train paper … train.profile={first: 20, steps: 5}
    python benchmarks/gpu_gaps.py runs/paper/profile/rank*.trace.json.gz [--least 20] [--shown 20]

A gap is a time of at least ``--least`` µs in which no kernel and no copy runs. It is listed with the innermost
operation of the host at its end, which launches the next kernel, and summed over all gaps of that name.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from bisect import bisect_right
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cpu_op", "user_annotation", "python_function", "cuda_runtime")


class Gap(NamedTuple):
    """A time in which the GPU idles: its start and length, µs, and the host's innermost operation at its end."""

    start: float
    length: float
    host: str


def main(arguments: list[str] | None = None) -> None:
    """Print the gaps of the traces that the command line names."""
    options = _parser().parse_args(arguments)
    for path in options.traces:
        events = read(path)
        busy, span = busy_share(events)
        found = gaps(events, options.least)
        print(f"{path}: {span / 1e3:.2f} ms, of which the GPU works {busy:.1%}; {len(found)} gaps")
        sums: dict[str, list[float]] = defaultdict(list)
        for gap in found:
            sums[gap.host].append(gap.length)
        for host, lengths in sorted(sums.items(), key=lambda item: -sum(item[1]))[: options.shown]:
            print(f"{sum(lengths) / 1e3:9.3f} ms in {len(lengths):5} gaps before {host}")


def read(path: Path) -> list[dict[str, Any]]:
    """The complete events of a trace in Chrome's format, which may be compressed."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return [event for event in events if event.get("ph") == "X" and "dur" in event]


def busy_intervals(events: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """The times ``(start, stop)``, µs, at which the GPU works, merged over its streams, in order."""
    found: list[tuple[float, float]] = []
    works = (event for event in events if event.get("cat") in ON_GPU)
    for start, stop in sorted((event["ts"], event["ts"] + event["dur"]) for event in works):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found


def busy_share(events: list[dict[str, Any]]) -> tuple[float, float]:
    """The share of the time between its first and last work in which the GPU works, and that time, µs."""
    intervals = busy_intervals(events)
    if not intervals:
        sys.exit("the trace has no work of a GPU; profile a run on one")
    span = intervals[-1][1] - intervals[0][0]
    return sum(stop - start for start, stop in intervals) / span, span


def gaps(events: list[dict[str, Any]], least: float) -> list[Gap]:
    """The gaps of at least ``least`` µs, in order."""
    intervals = busy_intervals(events)
    host = sorted((event for event in events if event.get("cat") in ON_HOST), key=lambda event: event["ts"])
    starts = [event["ts"] for event in host]
    found = []
    for (_, start), (stop, _) in pairwise(intervals):
        if stop - start >= least:
            found.append(Gap(start, stop - start, _innermost(host, starts, stop)))
    return found


def _innermost(host: list[dict[str, Any]], starts: list[float], time: float) -> str:
    """The name of the last operation that has begun before ``time`` and not ended, or of the last one that began."""
    last = bisect_right(starts, time) - 1
    for place in range(last, max(-1, last - 2000), -1):
        event = host[place]
        if event["ts"] + event["dur"] >= time and event.get("cat") != "cuda_runtime":
            return str(event["name"])
    return str(host[last]["name"]) if last >= 0 else "nothing"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    parser.add_argument("--least", type=float, default=20.0, metavar="µs", help="shorter gaps are left out")
    parser.add_argument("--shown", type=int, default=20, metavar="n", help="names of a trace")
    return parser


if __name__ == "__main__":
    main()
