"""From a bare checkout to a trained model or a passed test run, with nothing but Python 3.11 or newer.

    python3 launch/bootstrap.py train [key=value ...]   install into .venv, then train the quick start
    python3 launch/bootstrap.py test                    install into .venv, then ruff, mypy and all tests

An environment that was made from the same setup.cfg is used again.
"""

import hashlib
import os
import shlex
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
TORCH = "torch==2.13.0"
CPU_PROCESSES = 2
EXTRAS = {"train": "tokenizers", "test": "test"}


def main() -> int:
    """Do what the command line says; return the exit status."""
    command, *settings = sys.argv[1:] or [""]
    if command not in EXTRAS or (command == "test" and settings):
        print(__doc__, file=sys.stderr)
        return 2
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever runs this may have any Python)
        print(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    try:
        install(EXTRAS[command])
        return train(settings) if command == "train" else test()
    except subprocess.CalledProcessError as error:
        print(f"error: this command failed with status {error.returncode}: {shlex.join(error.cmd)}", file=sys.stderr)
        return 1


def install(extra: str) -> None:
    """Make the environment, unless it was made before from the same setup.cfg.

    torch comes first and stays pinned, because building DeepSpeed's wheel asks which one is there; DS_BUILD_OPS=0 keeps
    DeepSpeed from compiling extensions.
    """
    stamp = ENVIRONMENT / f"installed-{extra}"
    recipe = hashlib.sha256((ROOT / "setup.cfg").read_bytes() + f"{TORCH} {ROOT} {sys.version}".encode()).hexdigest()
    if PYTHON.exists() and stamp.exists() and stamp.read_text() == recipe:
        print(f"using {ENVIRONMENT}", flush=True)
        return
    print(f"making {ENVIRONMENT}", flush=True)
    venv.create(ENVIRONMENT, with_pip=True, clear=not PYTHON.exists())
    constraint = ENVIRONMENT / "constraint.txt"
    constraint.write_text(TORCH + "\n")
    run("-m", "pip", "install", "--quiet", TORCH)
    run("-m", "pip", "install", "--quiet", "-c", str(constraint), "-e", f"{ROOT}[{extra}]", DS_BUILD_OPS="0")
    stamp.write_text(recipe)


def train(settings: list[str]) -> int:
    """Train the quick start, one process a GPU or two on the CPU."""
    count = "import torch; print(torch.cuda.device_count())"
    gpus = int(subprocess.run([PYTHON, "-c", count], check=True, capture_output=True, text=True).stdout)
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus or CPU_PROCESSES}")
    run(*launcher, "launch/train.py", *settings, OMP_NUM_THREADS="1")
    return 0


def test() -> int:
    """Run every check, also after one has failed."""
    checks = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",), ("pytest",))
    failed = [check[0] for check in checks if run("-m", *check, check=False)]
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


def run(*arguments: str, check: bool = True, **environment: str) -> int:
    """Run the environment's Python in the checkout, with some environment variables more; return its status."""
    command = [str(PYTHON), *arguments]
    print(f"$ {shlex.join(command)}", flush=True)
    return subprocess.run(command, check=check, cwd=ROOT, env=os.environ | environment).returncode


if __name__ == "__main__":
    sys.exit(main())
