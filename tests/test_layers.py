"""Imports point down only; the order is that of ARCHITECTURE.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "longnet_dist"
LAYERS = [
    "errors",
    "caches",
    "private_interfaces",
    "registry",
    "extras",
    "machine",
    "numerics",
    "geometry",
    "optim",
    "config",
    "data",
    "comm",
    "estimate",
    "attention",
    "ops",
    "model",
    "engine",
    "interop",
    "hf",
    "checkpoint",
    "inference",
    "telemetry",
    "resilience",
    "train",
    "experiments",
    "serving",
    "cli",
    "__main__",
]


def imported_layers(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module or ""]
        yield from (name.split(".")[1] for name in names if name.startswith("longnet_dist."))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    if path == ROOT / "__init__.py":
        return
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert layer in LAYERS, f"{layer} is no layer; add it to LAYERS and ARCHITECTURE.md"
    for target in imported_layers(path):
        assert LAYERS.index(target) <= LAYERS.index(layer), f"{path} imports {target}, a layer above {layer}"
