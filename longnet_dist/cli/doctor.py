"""``longnet doctor``: what this machine has, what runs on it, and what to do about what is missing or broken."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from longnet_dist.cli.program.parser import CommandParser

SUMMARY = "look at this machine: versions, GPUs, kernels, ranks; say what to do"
BROKEN_STATUS = 1
EXAMPLES = """\
examples:
  longnet doctor
  longnet doctor --json > doctor.json

It imports every package that is installed, runs a small attention forward and backward on each device and compares it
with its definition, and adds numbers over processes. The last lines are the findings, each with what to do about it.
The exit status is 1 if something that is installed is broken, else 0; that something is absent, a GPU too, is no fault.
"""


def main(arguments: Sequence[str]) -> None:
    """Print what was found as the command line says.

    Args:
        arguments: the words behind ``longnet doctor``.

    Raises:
        SystemExit: with status 1 if something that is installed is broken.
    """
    options = parser().parse_args(arguments)

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


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``longnet doctor``."""
    result = CommandParser("doctor", "Find out what this machine has and what runs on it.", EXAMPLES)
    result.add_argument("--json", action="store_true", help="print a JSON object")
    return result
