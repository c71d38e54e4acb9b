"""Warnings of a command beside its progress bar: in lines of their own, once for each kind, from one rank."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import longnet_dist
from longnet_dist.errors import LongNetError

PACKAGE = Path(longnet_dist.__file__).parent


@contextmanager
def messages_beside_bars() -> Iterator[None]:
    """Write warnings and log messages of this package above the progress bar; of the ranks of a launch the first does.

    Warnings that differ in their numbers alone are of one kind. Those of other packages keep their file and line.
    """
    logger, told = logging.getLogger(longnet_dist.__name__), set[str]()
    handlers, show = logger.handlers[:], warnings.showwarning

    def shown_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not Path(filename).is_relative_to(PACKAGE):
            text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
        elif (kind := re.sub(r"\d+", "", str(message))) not in told:
            told.add(kind)
            text = f"warning: {message}"
        else:
            return
        _write(text)

    warnings.showwarning = shown_warning
    logger.handlers[:] = [_AboveBars()]
    try:
        yield
    finally:
        warnings.showwarning = show
        logger.handlers[:] = handlers


class _AboveBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _write(f"{record.levelname.lower()}: {record.getMessage()}")


def _is_first() -> bool:
    """Say whether this process is the first of its launch; it is only asked where there is something to say."""
    from longnet_dist.comm.launch_env import LaunchEnvironment

    try:
        return LaunchEnvironment.read(os.environ).rank == 0
    except LongNetError:  # which the command will tell
        return True


def _write(text: str) -> None:
    """Write a line to stderr on the first rank; bars are taken away and drawn again below it."""
    if not _is_first():
        return
    bars: Any = sys.modules.get("tqdm")  # without it there is no bar, and importing it takes a while
    if bars is None:
        sys.stderr.write(f"{text}\n")
    else:
        bars.tqdm.write(text, file=sys.stderr)
