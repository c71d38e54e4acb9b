"""The argument parser of every subcommand."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """A parser that keeps the lines of its examples and names the option nearest to a misspelt one.

    Args:
        name: of the subcommand.
        description: what it does, a sentence.
        examples: command lines, and what else is worth saying below the options.
    """

    def __init__(self, name: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"longnet {name}",
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with status 2."""
        _, unknown, words = message.partition("unrecognized arguments: ")
        if unknown:
            options = re.findall(r"--[\w-]+", self.format_usage())
            wrong = words.partition(" ")[0].partition("=")[0]  # which may be empty
            near = difflib.get_close_matches(wrong, options, n=1)
            message += f" (the nearest option is {near[0]})" if near else f" (see {self.prog} --help)"
        super().error(message)

    def add_processes(self, on_cpus: int = 1) -> None:
        """Add ``--processes``.

        Args:
            on_cpus: its default where there is no GPU.
        """
        text = f"processes to start (default: one for each GPU, else {on_cpus})"
        self.add_argument("--processes", type=positive, metavar="n", help=text)


def natural(text: str) -> int:
    """Parse a number of at least 0, for ``type=``."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {number}")
    return number


def positive(text: str) -> int:
    """Parse a number of at least 1, for ``type=``."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def above_zero(text: str) -> float:
    """Parse a finite number above 0, for ``type=``."""
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, not {text}")
    return number
