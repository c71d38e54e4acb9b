"""No function is too long or has too many branches."""

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
