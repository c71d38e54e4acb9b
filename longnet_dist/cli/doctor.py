"""``longnet doctor``: what this machine or the ranks of a launcher have, and what to do about faults."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from longnet_dist.cli.program.parser import CommandParser

SUMMARY = "look at this machine: versions, GPUs, kernels, ranks; say what to do"
BROKEN_STATUS = 1
EXAMPLES = """\
examples:
  longnet doctor
  longnet doctor --json > doctor.json
  srun --ntasks-per-node=8 longnet doctor --folder runs
  torchrun --nnodes=4 --nproc_per_node=8 ... -m longnet_dist doctor

It imports every package that is installed, runs a small attention forward and backward on each device and compares it
with its definition, and adds numbers over processes. The last lines are the findings, each with what to do about it.
The exit status is 1 if something that is installed is broken, else 0; that something is absent, a GPU too, is no fault.

Under torchrun, srun, mpirun or deepspeed the ranks are compared instead: the matmul rate of each device, the bandwidth
inside and between hosts, versions, clocks, and whether all see the same folder. The outlier's host is named. The exit
status is 2 on all ranks if there is one, else 0.
"""


def main(arguments: Sequence[str]) -> None:
    """Print what was found as the command line says.

    Args:
        arguments: the words behind ``longnet doctor``.

    Raises:
        SystemExit: with status 1 if something that is installed is broken, 2 if a rank is unlike the others.
        LongNetError: the ranks of a launcher do not meet.
    """
    options = parser().parse_args(arguments)

    from longnet_dist.comm.launch_env import launcher_of

    if launcher_of(os.environ):
        compare_ranks(options.folder, options.json)
        return
    from longnet_dist.cli.diagnosis.facts import collect
    from longnet_dist.cli.diagnosis.findings import findings
    from longnet_dist.cli.diagnosis.text import report
    from longnet_dist.telemetry.json_lines import json_text

    facts = collect()
    found = findings(facts)
    if options.json:
        print(json_text({**facts.to_json(), "findings": [asdict(finding) for finding in found]}))
    else:
        print(report(facts, found))
    if any(finding.fault for finding in found):
        raise SystemExit(BROKEN_STATUS)


def compare_ranks(folder: Path, json: bool) -> None:
    """Measure on all ranks of a launcher, compare them, and let rank 0 print what was found. Every rank must call.

    Args:
        folder: that all ranks should share.
        json: print a JSON object.

    Raises:
        SystemExit: with status 2 on all ranks if one is unlike the others.
        LongNetError: the ranks do not meet.
    """
    from longnet_dist.cli.diagnosis.cluster import measure_ranks
    from longnet_dist.cli.diagnosis.comparison import compare, report_ranks
    from longnet_dist.comm.launch_env import LaunchEnvironment
    from longnet_dist.errors import USER_ERROR_STATUS
    from longnet_dist.telemetry.json_lines import json_text

    launch = LaunchEnvironment.read(os.environ)
    ranks = measure_ranks(launch, folder)
    found = compare(ranks, folder)
    if launch.rank == 0:
        values = {"ranks": [asdict(rank) for rank in ranks], "findings": [asdict(finding) for finding in found]}
        print(json_text(values) if json else report_ranks(ranks, found))
    if found:
        raise SystemExit(USER_ERROR_STATUS)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``longnet doctor``."""
    result = CommandParser("doctor", "Find out what this machine has and what runs on it.", EXAMPLES)
    result.add_argument("--json", action="store_true", help="print a JSON object")
    result.add_argument(
        "--folder",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="under a launcher: the folder that all hosts should share (default: this one)",
    )
    return result
