"""The scripts of launch/, which are the subcommands of ``longnet`` for launchers and checkouts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "train": "train",
    "evaluate": "evaluate",
    "generate": "generate",
    "prepare_data": "prepare",
    "plan": "plan",
    "export": "export",
}


def run(script, *words, path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *words[: words.index("--") if "--" in words else 0], str(script)]
    words = words[words.index("--") + 1 :] if "--" in words else words
    return subprocess.run(
        [*command, *words],
        env=environment | ({"PYTHONPATH": str(path)} if path else {}),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_its_command(name):
    done = run(ROOT / "launch" / f"{name}.py", "--help", path=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: longnet {SCRIPTS[name]} ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_the_package_it_says_how_to_install(name, tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    done = run(tmp_path / "launch" / f"{name}.py", "-S", "--", "--help", path=None)  # -S: no installed packages
    assert done.returncode == 2
    assert done.stdout == ""
    remedy = "install this checkout first, from its folder: pip install -e '.[train]'"
    assert done.stderr == f"error: No module named 'longnet_dist'; {remedy}\n"


def test_the_configurations_of_the_checkout_are_the_packaged_ones():
    packaged = ROOT / "longnet_dist" / "config" / "runs"
    for folder in (ROOT / "configs", packaged):
        assert sorted(file.name for file in folder.glob("*.yaml")) == ["paper.yaml", "quickstart.yaml"]
    for file in (ROOT / "configs").glob("*.yaml"):
        assert file.read_bytes() == (packaged / file.name).read_bytes()
