"""The package, for the scripts of this folder, or one line that says how to install it."""

from __future__ import annotations

import sys
from typing import Any

try:
    from longnet_dist.cli.program.dispatch import run_command
    from longnet_dist.cli.program.exit_status import run_cli
except ModuleNotFoundError as missing:
    sys.stderr.write(f"error: {missing}; install this checkout first, from its folder: pip install -e '.[train]'\n")
    sys.exit(2)


def run(command: str, **options: Any) -> None:
    """Run a subcommand of ``longnet`` with the words behind this script, and exit with its status.

    Args:
        command: its name.
        options: for its ``main``, besides the words.
    """
    run_cli(lambda: run_command(command, sys.argv[1:], **options))
