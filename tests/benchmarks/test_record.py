"""What benchmarks share: a result that could not be written ends them before they measure."""

import argparse
import re
from pathlib import Path

import pytest

from benchmarks.record import output_file

ROOT = Path(__file__).parents[2] / "benchmarks"
WRITE_AS_THEY_GO = {"planner.py", "triton_matrix.py", "triton_versions.py"}  # the first does, before it measures


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(argparse.ArgumentTypeError, match="must be a file, but is a folder"):
        output_file(str(tmp_path))
    with pytest.raises(argparse.ArgumentTypeError, match="is no folder"):
        output_file(str(tmp_path / "file" / "a.json"))
    assert output_file(str(tmp_path / "new" / "a.json")).parent.is_dir()


def test_every_benchmark_with_a_file_of_results_checks_it():
    unchecked = {
        path.name
        for path in ROOT.glob("*.py")
        if re.search(r'"--output", type=Path, [^\n]*\.json', path.read_text(encoding="utf-8"))
    }
    assert unchecked <= WRITE_AS_THEY_GO
