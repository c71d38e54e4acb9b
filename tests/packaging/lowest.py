"""Run the tests that guard a model with the lowest version allowed of everything but torch.

python -m tests.packaging.lowest
"""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.environments import ROOT, Environment, closure, index_answers, told, torch_release, uv

EXTRAS = ("train", "tokenizers", "data", "mpi", "hf", "test")
# Steps that are not finite change nothing (DeepSpeed); kernels in Triton's interpreter (numpy); checkpoints
# (safetensors, pydantic); configurations (PyYAML, pydantic); tokenizers; curves (matplotlib, TensorBoard).
TESTS = (
    *("tests/train/test_step.py", "tests/attention", "tests/checkpoint", "tests/config"),
    *("tests/data/test_tokenizers.py", "tests/telemetry"),
)

# Compiling every kernel takes minutes and depends on Triton alone; the whole suite does it.
LEFT_OUT = "--ignore=tests/attention/kernels/test_compile.py"
# An old release may still use what a newer one of its own requirements has deprecated.
WARNINGS = ("-W", "ignore::DeprecationWarning", "-W", "ignore::PendingDeprecationWarning")


def main() -> None:
    """Install the lowest versions into an environment of their own and run ``TESTS`` there.

    Raises:
        SystemExit: they cannot be installed together, or a test fails.
    """
    if not index_answers():
        return
    with tempfile.TemporaryDirectory(dir=sys.prefix) as beside:
        environment = Environment(Path(beside) / "lowest")
        pins = Path(beside) / "lowest.txt"
        lowest = lowest_versions()
        with told(f"lowest: {' '.join(lowest)}"):
            pins.write_text("\n".join(solve(lowest)))
            environment.install("--no-deps", "-r", str(pins))
        with told(f"{' '.join(TESTS)}"):
            command = [
                str(environment.python),
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                *WARNINGS,
                LEFT_OUT,
                *TESTS,
            ]
            path = f"{environment.python.parent}{os.pathsep}{os.environ['PATH']}"
            environ = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
            raise SystemExit(subprocess.run(command, cwd=ROOT, env=environ).returncode)


def lowest_versions() -> list[str]:
    """Return a pin for each requirement of setup.cfg that applies here and has a lower bound, but torch's."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = setup["options"]["install_requires"].split("\n")
    for extra in EXTRAS:
        lines += setup["options.extras_require"][extra].split("\n")
    pins = []
    for requirement in map(Requirement, filter(None, lines)):
        bounds = [bound.version for bound in requirement.specifier if bound.operator in (">=", "==")]
        applies = requirement.marker is None or requirement.marker.evaluate()
        if bounds and applies and requirement.name != "torch":
            pins.append(f"{requirement.name}=={bounds[0]}")
    return pins


def solve(lowest: list[str]) -> list[str]:
    """Return pins of everything that the lowest versions need and torch has not brought already.

    A CUDA build of torch pins its Triton; a CPU build has none, and there the lowest runs.
    """
    there = closure("torch")
    mine = [pin for pin in lowest if canonicalize_name(Requirement(pin).name) not in there]
    fixed = [f"torch=={torch_release()}"]
    later = [pin for pin in mine if pin.startswith("triton==")]
    given = "\n".join([*fixed, *(pin for pin in mine if pin not in later)])
    solved = uv("pip", "compile", "--quiet", "--no-header", "--no-annotate", "-", given=given).stdout.splitlines()
    brought = set(there) | {"triton"}
    names = {pin: canonicalize_name(Requirement(pin).name) for pin in solved}
    cuda = ("nvidia-", "cuda-")
    return [*later, *(pin for pin, name in names.items() if name not in brought and not name.startswith(cuda))]


if __name__ == "__main__":
    main()
