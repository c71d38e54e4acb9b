"""No function is too long, has too many branches, or enters a module again and again."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(file for folder in ("longnet_dist", "launch", "benchmarks") for file in (ROOT / folder).rglob("*.py"))
BRANCHES = (
    ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.With, ast.AsyncWith, ast.Assert,
    ast.comprehension, ast.match_case,
)  # fmt: skip


def complexity(function):
    """Cyclomatic complexity: 1, and 1 for every branch and every further operand of a boolean."""
    nodes = list(ast.walk(function))
    operands = sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
    return 1 + sum(isinstance(node, BRANCHES) for node in nodes) + operands


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_functions_are_short_and_simple(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 80, f"{node.name} has {lines} lines"
            assert complexity(node) <= 16, f"{node.name} has complexity {complexity(node)}"


def visits(file, name):
    """Names that a function takes from each module of the package."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    homes = {
        alias.asname or alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("longnet_dist")
        for alias in node.names
    }
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    body = [node for statement in function.body for node in ast.walk(statement)]
    used = {node.id for node in body if isinstance(node, ast.Name)}
    found = {}
    for taken in used & homes.keys():
        found.setdefault(homes[taken], []).append(taken)
    return found


def test_a_run_enters_each_module_once_or_twice():
    """Whoever reads a run from its first line follows few links, and none back."""
    found = visits(ROOT / "longnet_dist" / "train" / "loop.py", "run_training")
    assert len(found) >= 5
    assert {module: names for module, names in found.items() if len(names) > 2} == {}
