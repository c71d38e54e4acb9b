"""ARCHITECTURE.md names what exists, in few words."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\]\(([^)#:]+)\)", TEXT)
PATHS = [name for name in re.findall(r"`([\w./*{}]+)`", TEXT) if "/" in name or name.endswith(".py")]


def test_it_is_short():
    assert len(TEXT.split()) <= 2000


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("path", PATHS)
def test_paths_exist(path):
    assert any(next(place.glob(path.rstrip("/")), None) for place in (ROOT, ROOT / "longnet_dist")), path


def test_folders_of_more_than_ten_files_are_explained():
    """At most twelve, and ARCHITECTURE.md says why."""
    for folder in (ROOT / "longnet_dist").rglob("*"):
        modules = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
        if len(modules) > 10:
            assert len(modules) <= 12, folder
            section = TEXT.split("## Where a folder is larger than ten files")[1].split("##")[0]
            assert f"`{folder.name}`" in section, folder


def test_a_module_name_stands_in_one_folder():
    """Names that a pattern of folders repeats are the exceptions, and commands."""
    twins = {"__init__", "reference", "triton", "torch", "kernel", "forward", "backward", "fetch", "multiply", "launch"}
    twins |= {"tiles", "choice", "registry"}
    places = {}
    for file in (ROOT / "longnet_dist").rglob("*.py"):
        if file.stem not in twins and "cli" not in file.parts:
            places.setdefault(file.stem, []).append(file)
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
