"""What every result file says of the run that made it."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from longnet_dist.errors import ConfigError
from longnet_dist.machine import check_writable_file, cpu_name


def environment() -> dict[str, str | int]:
    """Hardware, versions, commit and date."""
    facts: dict[str, str | int] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "gpus": torch.cuda.device_count(),
            "cuda": str(torch.version.cuda),
        }
        facts |= {name: version(name) for name in ("triton", "quack-kernels") if find_spec(name.split("-")[0])}
    return facts


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Median clock (MHz), power (W) and temperature (°C) of the first GPU in the meantime; empty without nvidia-smi.

    Cards of one kind differ in them, and so in all times.
    """
    seen: dict[str, float] = {}
    if shutil.which("nvidia-smi") is None:
        yield seen
        return
    names = ("clocks.sm", "power.draw", "temperature.gpu")
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "-i", "0", "-lms", "50"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as sampler:
        try:
            yield seen
        finally:
            sampler.terminate()
            lines = [line.split(",") for line in sampler.communicate()[0].splitlines() if line.count(",") == 2]
    for name, values in zip(names, zip(*lines, strict=True), strict=False):
        numbers = [float(value) for value in values if value.strip().replace(".", "").isdigit()]
        if numbers:
            seen[name] = statistics.median(numbers)


def output_file(text: str) -> Path:
    """Parse the file that a benchmark writes at its end, for ``type=``: refused now if it cannot be written then."""
    file = Path(text)
    try:
        check_writable_file(file, f"--output={file}")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _commit() -> str:
    """What COMMIT says, for code that was copied without its history, else that of the checkout."""
    if commit := os.environ.get("COMMIT"):
        return commit
    root = Path(__file__).parents[1]
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "unknown"
