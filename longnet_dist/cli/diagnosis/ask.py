"""Asking a probe, whatever becomes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from longnet_dist.cli.diagnosis.probes import ANSWER
from longnet_dist.cli.program.processes import python_options

SECONDS = 300  # kernels may have to be compiled
# Set for a rank of a launcher; a probe is none.
NOT_HANDED_ON = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LAST_CHARACTERS = 300


def ask(*questions: Sequence[str], seconds: float = SECONDS) -> list[dict[str, Any]]:
    """Run probes at the same time, each in a process of its own, and return what each has told.

    Args:
        questions: for each process the probe's name and its arguments.
        seconds: for all of them; what has not ended by then is killed.

    Returns:
        For each process its answers. ``failure`` is one more, where it failed: the error, or how the process ended.
    """
    for words in questions:
        # Importing and compiling may take a minute on a GPU.
        print(f"doctor: checking {' '.join(words)} …", file=sys.stderr, flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in NOT_HANDED_ON}
    command = [sys.executable, *python_options(), "-m", "longnet_dist.cli.diagnosis.probes"]
    started = [
        subprocess.Popen(
            [*command, *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        for words in questions
    ]
    try:
        end = time.monotonic() + seconds
        return [_answers(process, max(0.0, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


def _answers(process: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    late = False
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = True
        process.kill()
        out, err = process.communicate()
    answers: dict[str, Any] = {}
    for line in out.splitlines():
        if line.startswith(ANSWER):
            answers |= json.loads(line.removeprefix(ANSWER))
    if late:
        answers["failure"] = "no answer in time"
    elif process.returncode and "failure" not in answers:
        answers["failure"] = f"{_end(process.returncode)}: {' '.join(err.split())[-LAST_CHARACTERS:]}".rstrip(": ")
    return answers


def _end(status: int) -> str:
    return f"the process was killed by signal {-status}" if status < 0 else f"the process ended with status {status}"
