"""Environments for the checks of packaging: bare, but for the torch that is here already.

uv installs into them, from the public index alone: neither pip's nor uv's settings of this machine apply.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# No settings of this machine, no other Python than this one, and no extension of DeepSpeed compiled.
_SETTINGS = {"UV_NO_CONFIG": "1", "UV_PYTHON_DOWNLOADS": "never", "DS_BUILD_OPS": "0", "PYTHONPATH": ""}


def torch_release() -> str:
    """Return the version of the torch that is installed, as the index knows it: without a label such as ``+cpu``."""
    return version("torch").partition("+")[0]


def closure(name: str) -> dict[str, str]:
    """Return the distributions that one needs, itself among them, and their versions, as they are installed here."""
    found: dict[str, str] = {}
    waiting = [Requirement(name)]
    while waiting:
        requirement = waiting.pop()
        key = canonicalize_name(requirement.name)
        try:
            here = distribution(key)
        except PackageNotFoundError:
            continue  # a marker or an extra that does not apply here
        if key not in found:
            found[key] = here.version
            needs = map(Requirement, here.requires or [])
            extras = {"extra": ""}
            waiting += [
                need
                for need in needs
                if need.marker is None
                or need.marker.evaluate(extras)
                or any(need.marker.evaluate({"extra": extra}) for extra in requirement.extras)
            ]
    return found


class Environment:
    """A virtual environment with torch and what torch needs, hard links to the files of this one.

    Args:
        folder: where it comes to lie, on the disk of this environment.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        (site,) = (folder / "lib").glob("python*/site-packages")
        for name in closure("torch"):
            _link(name, site)

    def install(self, *arguments: str) -> None:
        """Install from the public index with uv."""
        uv("pip", "install", "--quiet", "--python", str(self.python), *arguments)

    def run(self, *arguments: str, cwd: Path, status: int = 0) -> str:
        """Run this environment's Python, which finds nothing of the checkout, and return what it prints.

        Raises:
            SystemExit: it does not end with ``status``.
        """
        names = ("PYTHONPATH", "RANK", "WORLD_SIZE")
        environ = {name: value for name, value in os.environ.items() if name not in names}
        environ["PATH"] = f"{self.python.parent}{os.pathsep}{environ['PATH']}"
        command = [str(self.python), "-P", *arguments]
        print(f"$ {shlex.join(command)}", flush=True)
        result = subprocess.run(
            command, cwd=cwd, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        if result.returncode != status:
            raise SystemExit(f"{result.stdout}\nended with status {result.returncode}, not {status}")
        return result.stdout


def _link(name: str, site: Path) -> None:
    """Give ``site`` the files of a distribution of this environment; those outside of site-packages are left out."""
    here = distribution(name)
    for file in here.files or []:
        if ".." in file.parts or file.suffix == ".pyc":
            continue
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(str(here.locate_file(file)), target)
        except FileExistsError:
            continue  # two distributions may share a file of a namespace
        except OSError:  # another disk
            shutil.copy2(str(here.locate_file(file)), target)


def uv(*arguments: str, given: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run uv without the settings of this machine.

    Args:
        arguments: its command line.
        given: what it reads from its standard input.
        check: whether a failure ends this process.

    Raises:
        SystemExit: it fails, with what it printed.
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    command = [sys.executable, "-m", "uv", *arguments]
    given_options = {"stdin": subprocess.DEVNULL} if given is None else {"input": given}
    result = subprocess.run(command, cwd=ROOT, env=environ | _SETTINGS, capture_output=True, text=True, **given_options)
    if check and result.returncode:
        raise SystemExit(f"$ uv {shlex.join(arguments)}\n{result.stderr}")
    return result


def index_answers() -> bool:
    """Say whether the public index can be reached, by resolving a package that has no requirements."""
    answer = uv("pip", "compile", "--quiet", "--no-cache", "-", given="einops\n", check=False)
    if answer.returncode:
        print(f"\n!!! NOT CHECKED: the public index does not answer\n{answer.stderr}", flush=True)
    return answer.returncode == 0


@contextmanager
def told(what: str) -> Iterator[None]:
    """Print what is being checked, and how long it took."""
    began = time.monotonic()
    print(f"-- {what}", flush=True)
    yield
    print(f"   {time.monotonic() - began:.0f} s", flush=True)
