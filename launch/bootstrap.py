"""From a bare checkout to a trained model or a passed test run, with nothing but Python 3.11 or newer.

    python3 launch/bootstrap.py train [key=value ...]   install into .venv, then train the quick start
    python3 launch/bootstrap.py test                    install into .venv, then run every check of CI

An environment that was made from the same setup.cfg is used again. pip's own settings apply. If PIP_FIND_LINKS names a
folder with a wheel of torch, that one is taken: on a machine without a GPU its CPU build saves 2.5 GB.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
# The releases that all tests have run with. setup.cfg has no upper bound, but here a newer one's first warning would
# fail the tests.
TORCH = "torch>=2.11,<2.16"
EXTRAS = {"train": "train,tokenizers", "test": "test"}
CHECKS = {
    "style": ("ruff", "check", "."),
    "format": ("ruff", "format", "--check", "."),
    "types": ("mypy",),
    "every extra resolves from the public index": ("tests.packaging.resolve",),
    "the wheel trains outside the checkout": ("tests.packaging.wheel",),
    "the lowest versions allowed": ("tests.packaging.lowest",),
    "tests": ("pytest",),
}


def main() -> int:
    """Do what the command line says; return the exit status."""
    command, *settings = sys.argv[1:] or [""]
    if command not in EXTRAS or (command == "test" and settings):
        print(__doc__, file=sys.stderr)
        return 2
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever runs this may have any Python)
        print(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    # The driver's own tool tells of a GPU before torch is there to ask.
    extras = EXTRAS[command] + (",cuda" if shutil.which("nvidia-smi") else "")
    try:
        install(extras)
        if command == "test":
            return test()
        run("-m", "longnet_dist", "quickstart", *settings)
    except subprocess.CalledProcessError as error:
        print(f"error: this command failed with status {error.returncode}: {shlex.join(error.cmd)}", file=sys.stderr)
        return 1
    return 0


def install(extras: str) -> None:
    """Make the environment, unless it was made before from the same setup.cfg.

    DS_BUILD_OPS=0 keeps DeepSpeed from compiling extensions.
    """
    stamp = ENVIRONMENT / "installed"
    recipe = f"{(ROOT / 'setup.cfg').read_text()} {TORCH} {ROOT} {sys.version} {extras}"
    digest = hashlib.sha256(recipe.encode()).hexdigest()
    if PYTHON.exists() and stamp.exists() and digest in stamp.read_text().split():
        print(f"using {ENVIRONMENT}", flush=True)
        return
    print(f"making {ENVIRONMENT}: torch with its CUDA libraries is a download of about 2.5 GB", flush=True)
    venv.create(ENVIRONMENT, with_pip=True, clear=not PYTHON.exists())
    pip = ("-m", "pip", "install", "--quiet")
    if os.environ.get("PIP_FIND_LINKS") and run(*pip, "--no-index", "--no-deps", TORCH, check=False):
        print("PIP_FIND_LINKS has no such torch: it comes from the index", flush=True)
    run(*pip, TORCH, "-e", f"{ROOT}[{extras}]", DS_BUILD_OPS="0")
    with stamp.open("a") as made:
        made.write(f"{digest}\n")


def test() -> int:
    """Run every check, also after one has failed; say what each took."""
    failed, lines = [], []
    for name, check in CHECKS.items():
        print(f"\n== {name}", flush=True)
        began = time.monotonic()
        if run("-m", *check, check=False):
            failed.append(name)
        lines.append(f"{time.monotonic() - began:6.0f} s  {name}" + " FAILED" * (name in failed))
    print("\n".join(["", *lines, f"failed: {', '.join(failed)}" if failed else "all checks passed"]))
    return 1 if failed else 0


def run(*arguments: str, check: bool = True, **environment: str) -> int:
    """Run the environment's Python in the checkout, with some environment variables more; return its status."""
    command = [str(PYTHON), *arguments]
    print(f"$ {shlex.join(command)}", flush=True)
    return subprocess.run(command, check=check, cwd=ROOT, env=os.environ | environment).returncode


if __name__ == "__main__":
    sys.exit(main())
