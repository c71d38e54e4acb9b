"""From the words behind ``longnet`` to a subcommand."""

from __future__ import annotations

import difflib
import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from longnet_dist import __version__, cli
from longnet_dist.cli import features
from longnet_dist.cli.program.exit_status import run_cli
from longnet_dist.errors import ConfigError

EXAMPLES = """\
examples:
  longnet doctor                                   what this machine has, and what to do about what it lacks
  longnet quickstart                               train a small model of Python source in a few minutes
  longnet generate runs/quickstart --prompt "def "
  longnet train paper data.path=corpus.tokens      train on all GPUs of this machine

longnet COMMAND --help shows the options of a command, with examples. A mistake ends with one message and status 2.
"""


def run() -> None:
    """Run the command line of this process, and exit with its status."""
    run_cli(main)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the subcommand that a command line names.

    Args:
        arguments: the words behind ``longnet``, by default those of the process.

    Raises:
        ConfigError: there is no such subcommand.
    """
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name == "help" and rest:
        name, rest = rest[0], ["--help"]
    if name in ("-h", "--help", "help"):
        print(_help())
    elif name == "--version":
        print(f"longnet {__version__}")
    else:
        run_command(name, rest)


def run_command(name: str, arguments: Sequence[str], **options: Any) -> None:
    """Run one subcommand.

    Args:
        name: of the subcommand, which is that of its module.
        arguments: the words behind its name.
        options: further arguments of its ``main``.

    Raises:
        ConfigError: there is no such subcommand.
    """
    if name not in command_names():
        near = [known for known in command_names() if name and known.startswith(name)]
        near += difflib.get_close_matches(name, command_names(), n=1)
        hint = f"the nearest is {near[0]}" if near else f"there are {', '.join(command_names())}"
        raise ConfigError(f"longnet has no command {name!r}; {hint}; see longnet --help")
    command_module(name).main(arguments, **options)


def command_names() -> list[str]:
    """Return the names of all subcommands, in alphabetical order."""
    return sorted(_homes())


def command_module(name: str) -> Any:
    """Return the module of a subcommand."""
    return import_module(f"{_homes()[name]}.{name}")


def _homes() -> dict[str, str]:
    """Return the package of each subcommand: modules of ``longnet_dist.cli`` and of its folder ``features``."""
    return {
        module.name: package.__name__
        for package in (cli, features)
        for module in pkgutil.iter_modules(package.__path__)
        if not module.ispkg
    }


def _help() -> str:
    summaries = {name: command_module(name).SUMMARY for name in command_names()}
    lines = [f"  {name:<12}{summary}" for name, summary in summaries.items()]
    head = "usage: longnet COMMAND ...\n\nTrain language models with dilated attention (LongNet) on long sequences."
    options = "options:\n  -h, --help  show this text\n  --version   show the version"
    return "\n".join([head, "", "commands:", *lines, "", options, "", EXAMPLES.rstrip()])
