"""Run the tests that guard a model with the lowest version allowed of everything but torch.

python -m tests.packaging.lowest
"""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.environments import ROOT, Environment, closure, index_answers, told, torch_release, uv

# Steps that are not finite change nothing (DeepSpeed); kernels in Triton's interpreter (numpy); checkpoints
# (safetensors, pydantic); configurations (PyYAML, pydantic); tokenizers; curves (matplotlib, TensorBoard).
TESTS = (
    *("tests/train/test_step.py", "tests/attention", "tests/checkpoint", "tests/config"),
    *("tests/data/test_tokenizers.py", "tests/telemetry", "--ignore=tests/config/test_hf_model.py"),
)
# transformers has bounds of its own for packages of other extras, so its lowest release comes in a second environment,
# with the newest of what it does not pin.
GROUPS = {
    ("", "train", "tokenizers", "data", "mpi", "test"): TESTS,
    ("hf",): ("tests/hf", "tests/config/test_hf_model.py"),
}

# Compiling every kernel takes minutes and depends on Triton alone; the whole suite does it.
LEFT_OUT = "--ignore=tests/attention/kernels/test_compile.py"
# An old release may still use what a newer one of its own requirements has deprecated.
WARNINGS = ("-W", "ignore::DeprecationWarning", "-W", "ignore::PendingDeprecationWarning")


def main() -> None:
    """Install the lowest versions into environments of their own and run the tests of ``GROUPS`` there.

    Raises:
        SystemExit: they cannot be installed together, or a test fails.
    """
    if not index_answers():
        return
    for extras, tests in GROUPS.items():
        with tempfile.TemporaryDirectory(dir=sys.prefix) as beside:
            environment = Environment(Path(beside) / "lowest")
            pins = Path(beside) / "lowest.txt"
            lowest = lowest_versions(extras)
            with told(f"lowest: {' '.join(lowest)}"):
                pins.write_text("\n".join(solve([*lowest, *others(lowest)])))
                environment.install("--no-deps", "--compile-bytecode", "-r", str(pins))
            with told(f"{' '.join(tests)}"):
                options = ("-q", "-p", "no:cacheprovider", *WARNINGS, LEFT_OUT)
                command = [str(environment.python), "-m", "pytest", *options, *tests]
                path = f"{environment.python.parent}{os.pathsep}{os.environ['PATH']}"
                environ = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
                status = subprocess.run(command, cwd=ROOT, env=environ).returncode
            if status:
                raise SystemExit(status)


def requirements(extras: Iterable[str]) -> list[Requirement]:
    """Return what setup.cfg asks for here in some extras, the core's where an extra is empty, but torch."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    given = {**setup["options.extras_require"], "": setup["options"]["install_requires"]}
    found = [Requirement(line) for extra in extras for line in given[extra].split("\n") if line]
    return [x for x in found if x.name not in ("torch", "longnet-dist") and (x.marker is None or x.marker.evaluate())]


def lowest_versions(extras: Iterable[str]) -> list[str]:
    """Return a pin for each requirement that has a lower bound."""
    bounds = {
        requirement.name: [x.version for x in requirement.specifier if x.operator in (">=", "==")]
        for requirement in requirements(extras)
    }
    return [f"{name}=={versions[0]}" for name, versions in bounds.items() if versions]


def others(pins: Sequence[str]) -> list[str]:
    """Return the requirements of the core, training and tests that ``pins`` leave out, without versions."""
    pinned = {Requirement(pin).name for pin in pins}
    return [x.name for x in requirements(("", "train", "test")) if x.name not in pinned]


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
