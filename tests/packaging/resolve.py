"""Resolve every extra from the public index, as a machine without any local wheel would; nothing is installed.

python -m tests.packaging.resolve
"""

from __future__ import annotations

import configparser
import re

from tests.packaging.environments import ROOT, index_answers, told, uv

PYTHONS = ("3.11", "3.12", "3.13")
# Minor releases of torch; the newest follows from the index. Each pins a Triton of its own.
TORCHES = ("2.11", "2.12", "2.13", "2.14")
SYSTEMS = ("macos", "windows")


def main() -> None:
    """Resolve all extras together, which is harder than each alone, and the core on other systems.

    Raises:
        SystemExit: there is no solution, with uv's explanation.
    """
    if not index_answers():
        return
    extras = [f"--extra={name}" for name in extra_names()]
    for python in PYTHONS:
        with told(f"Python {python}, Linux, newest torch: {', '.join(extra_names())}"):
            print(f"   {versions(resolve(*extras, f'--python-version={python}', '--python-platform=linux'))}")
    for torch in TORCHES:
        with told(f"Python {PYTHONS[0]}, Linux, torch {torch}: all extras"):
            print(f"   {versions(resolve(*extras, f'--python-version={PYTHONS[0]}', torch=f'torch=={torch}.*'))}")
    for system in SYSTEMS:
        with told(f"Python {PYTHONS[-1]}, {system}: core and tokenizers"):
            platform = (f"--python-version={PYTHONS[-1]}", f"--python-platform={system}")
            print(f"   {versions(resolve('--extra=tokenizers', *platform))}")


def extra_names() -> list[str]:
    """Return the names of all extras of setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return list(setup["options.extras_require"])


def resolve(*arguments: str, torch: str | None = None) -> str:
    """Return the pins of a solution, a line each.

    Args:
        arguments: of ``uv pip compile``.
        torch: a further requirement.
    """
    plain = ("--quiet", "--no-header", "--no-annotate")
    if torch is None:
        return uv("pip", "compile", *plain, "setup.cfg", *arguments).stdout
    return uv("pip", "compile", *plain, "setup.cfg", "-", *arguments, given=torch).stdout


def versions(pins: str) -> str:
    """Return the pins that matter most, and how many there are."""
    shown = re.findall(r"^((?:torch|triton|numpy|deepspeed|flash-attn-4|transformers)==\S+)", pins, re.MULTILINE)
    return f"{len(pins.splitlines())} packages: {', '.join(shown)}"


if __name__ == "__main__":
    main()
