"""Every private interface of another package is in one file, and the installed versions have it."""

import ast
import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest

from longnet_dist import private_interfaces
from longnet_dist.errors import ConfigError
from longnet_dist.private_interfaces import INTERFACES, Interface, private

ROOT = Path(__file__).parents[1]
OWN_FILE = ROOT / "longnet_dist" / "private_interfaces.py"
# Gluon's parts that the kernels for Hopper are made of; tests/attention/kernels compile them with every Triton allowed.
HOPPER = ROOT / "longnet_dist" / "attention" / "kernels" / "hopper"
FILES = [
    file
    for folder in ("longnet_dist", "launch", "benchmarks")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if file != OWN_FILE and file not in (HOPPER / "gluon_api.py", HOPPER / "instructions.py")
]
# Documented methods of the standard library that begin with an underscore.
DOCUMENTED = {"_replace", "_asdict", "_fields", "_exit", "_current_frames", "_lru_cache_wrapper"}


def own_names():
    """Underscored names that this repository defines."""
    for file in [*FILES, OWN_FILE]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                yield from [node.attr] * (isinstance(node.value, ast.Name) and node.value.id == "self")


OWN = set(own_names())


def foreign(source):
    """Underscored names of other packages that a source uses."""
    for node in ast.walk(ast.parse(source)):
        names = [node.attr] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("longnet_dist", "__future__")):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        yield from (name for name in names if name.startswith("_") and not name.startswith("__"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_other_file_uses_one(file):
    found = set(foreign(file.read_text(encoding="utf-8"))) - OWN - DOCUMENTED
    assert not found, f"put {sorted(found)} behind a function of longnet_dist/private_interfaces.py, with its reason"


@pytest.mark.parametrize("source", ["from torch._C import x", "import torch\ntorch.cuda.memory._dump_snapshot(1)"])
def test_the_search_finds_them(source):
    assert set(foreign(source)) - OWN - DOCUMENTED


@pytest.mark.parametrize("path", INTERFACES)
def test_the_installed_version_has_it(path):
    """A canary: where it fails, read the release notes of the package that its message names."""
    if find_spec(path.partition(".")[0].partition(":")[0]) is None:
        pytest.skip(f"{path} needs a package that is not installed")
    found = private(path)
    if INTERFACES[path].parameters:
        missing = set(INTERFACES[path].parameters) - set(inspect.signature(found).parameters)
        assert not missing, f"{path} has no parameters {sorted(missing)} any more: {INTERFACES[path].reason}"


def test_every_entry_is_used():
    source = OWN_FILE.read_text(encoding="utf-8").partition("\n@bounded_cache")[2]
    for path in INTERFACES:
        name = path.partition(":")[2]
        leaf = next(part for part in reversed(name.split(".")) if part != "default")
        assert leaf in source or leaf.removesuffix("_backward") in source, path


def test_a_missing_interface_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(INTERFACES, "torch.nn:Module._gone", Interface("a test asks for it"))
    private_interfaces.private.cache_clear()
    with pytest.raises(ConfigError, match=r"torch \d.* has no torch\.nn\.Module\._gone .*because a test asks for it"):
        private("torch.nn:Module._gone")
