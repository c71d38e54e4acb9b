"""The site: built strictly, so that no link, anchor or docstring is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from longnet_dist.config.loading import known_keys
from longnet_dist.config.schema import Config
from tests.docs.pages import ROOT

pytestmark = pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra docs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_table_of_keys_is_that_of_the_schema(site: Path) -> None:
    page = (site / "training" / "index.html").read_text(encoding="utf-8")
    missing = [key for key in known_keys(Config) if f"<code>{key}</code>" not in page]
    assert not missing


def test_docstrings_are_markdown(site: Path) -> None:
    page = (site / "reference" / "index.html").read_text(encoding="utf-8")
    assert "dilated_attention" in page
    assert not [role for role in (":class:", ":func:", ":meth:", ":math:", ".. math::") if role in page]


def test_files_of_the_repository_are_part_of_the_site(site: Path) -> None:
    assert (site / "repository" / "benchmarks" / "results" / "billion.png").is_file()
    assert (site / "repository" / "benchmarks" / "results" / "billion_h200.json").is_file()
    assert (site / "ARCHITECTURE" / "index.html").is_file()
