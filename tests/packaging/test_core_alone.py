import subprocess
import sys
from pathlib import Path

import pytest

import longnet_dist

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("core_alone.py")
HEAVY = ("deepspeed", "matplotlib", "tensorboard")


@pytest.mark.slow
def test_the_core_runs_without_extras_and_without_posix(tmp_path):
    command = [sys.executable, "-W", "error", str(SCRIPT), str(tmp_path / "runs"), "--fake"]
    # torch asks for the user's name, which Windows has in its environment.
    environment = {"PYTHONPATH": str(ROOT), "USERNAME": "user"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("the core is alone\n")


def test_attention_imports_no_package_of_training():
    code = (
        "import sys; from longnet_dist import DilatedAttention, LongNet, dilated_attention\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert result.stdout == "[]\n"


def test_the_release_files_name_the_version():
    version = longnet_dist.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    releases = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")]
    assert releases[0].startswith(f"## [{version}]")
