"""Build the sdist and from it the wheel; install that into a bare environment; train from it outside the checkout.

python -m tests.packaging.wheel
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import longnet_dist
from tests.packaging.environments import ROOT, Environment, index_answers, told

QUICK = ("train.steps=4", "train.validate_every=4", "train.validation_tokens=8192", "train.checkpoint_every=4")


def main() -> None:
    """Check that a user of the wheel gets what a checkout has.

    Raises:
        SystemExit: a file is missing from the wheel, or a command fails.
    """
    if not index_answers():
        return
    with tempfile.TemporaryDirectory() as outside, tempfile.TemporaryDirectory(dir=sys.prefix) as beside:
        work = Path(outside)
        with told("sdist and wheel"):
            wheel = build(work / "dist")
            check_files(wheel)
        environment = Environment(Path(beside) / "bare")
        with told("the wheel without extras"):
            environment.install(str(wheel))
            core(environment, work)
        with told("the wheel with the extra train"):
            environment.install(f"{wheel}[train]")
            train(environment, work)


def build(folder: Path) -> Path:
    """Build both into ``folder`` and return the wheel, which is made from the unpacked sdist."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert list(folder.glob("*.tar.gz"))
    return wheel


def check_files(wheel: Path) -> None:
    """Compare the files of the wheel with those of the package, and its metadata with what the package says.

    Raises:
        SystemExit: they differ.
    """
    package = ROOT / "longnet_dist"
    ours = {str(path.relative_to(ROOT)) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    packed = {name for name in names if name.startswith("longnet_dist/")}
    if ours != packed:
        raise SystemExit(f"not in the wheel: {sorted(ours - packed)}; only in the wheel: {sorted(packed - ours)}")
    if f"\nVersion: {longnet_dist.__version__}\n" not in metadata or not any("LICENSE" in name for name in names):
        raise SystemExit(f"{wheel.name} lacks the version {longnet_dist.__version__} or the licence")
    print(f"   {wheel.name}: {len(packed)} files of the package")


def core(environment: Environment, work: Path) -> None:
    """Run what needs no extra, and look at how training is refused."""
    script = str(shutil.copy(Path(__file__).with_name("core_alone.py"), work))
    print(environment.run("-W", "error", script, str(work / "core"), cwd=work).rpartition("\n")[0].splitlines()[-1])
    place = environment.run("-c", "import longnet_dist; print(longnet_dist.__file__)", cwd=work)
    if str(environment.python.parents[1]) not in place:
        raise SystemExit(f"the package came from {place}")
    version = environment.run("-m", "longnet_dist", "--version", cwd=work).strip()
    if version != f"longnet {longnet_dist.__version__}":
        raise SystemExit(f"longnet --version says {version!r}")
    refused = environment.run("-m", "longnet_dist", "quickstart", cwd=work, status=2)
    if "pip install 'longnet-dist[train]'" not in refused or "Traceback" in refused or (work / "runs").exists():
        raise SystemExit(f"training without its extra said: {refused}")
    environment.run("-m", "longnet_dist", "plan", "paper", "--device", "h100", cwd=work)


def train(environment: Environment, work: Path) -> None:
    """Train the quick start for some steps by the command ``longnet``, and use what it leaves.

    Raises:
        SystemExit: a command fails, or its files are not there.
    """
    longnet = str(environment.python.with_name("longnet"))
    environment.run(longnet, "quickstart", *QUICK, cwd=work)
    run = work / "runs" / "quickstart"
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    missing = [name for name in ("loss.png", "sample.txt", "config.yaml") if not (run / name).is_file()]
    if len(losses) != 4 or missing:
        raise SystemExit(f"the quick start left {len(losses)} losses and not {missing}")
    environment.run(longnet, "generate", str(run), "--prompt", "def ", "--tokens", "8", cwd=work)
    environment.run(longnet, "export", str(run), str(work / "exported"), cwd=work)
    print(f"   losses {', '.join(f'{loss:.2f}' for loss in losses)}")


if __name__ == "__main__":
    main()
