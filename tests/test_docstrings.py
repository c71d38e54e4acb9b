"""Public names have docstrings that begin with a sentence."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "longnet_dist"
FILES = sorted(ROOT.rglob("*.py"))
HOPPER = ROOT / "attention" / "kernels" / "hopper"  # device code, where a class is a record of what a program takes
# Words that begin half a sentence, whose verb is in the reader's head.
FRAGMENTS = ("Of ", "As ", "What ", "Whether ", "How ", "Where ", "Which ", "That ")
NOUNS = ("The ", "A ", "An ", "All ", "Rows ")
LEAST_SHARE = 0.95


def public(tree, prefix=""):
    """Yield the name and docstring of every public class, function and method; nested functions are private."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, ast.get_docstring(node)
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")


def entries():
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        place = str(file.relative_to(ROOT))
        if tree.body:
            yield f"{place}:", ast.get_docstring(tree)
        yield from ((f"{place}:{name}", docstring) for name, docstring in public(tree))


def test_nearly_all_public_names_have_one():
    found = dict(entries())
    missing = sorted(name for name, docstring in found.items() if not docstring)
    assert 1 - len(missing) / len(found) >= LEAST_SHARE, missing


@pytest.mark.parametrize(
    "file", [file for file in FILES if HOPPER not in file.parents], ids=lambda file: str(file.relative_to(ROOT))
)
def test_they_begin_with_a_sentence(file):
    for name, docstring in public(ast.parse(file.read_text(encoding="utf-8"))):
        # "A Shards says …" is a sentence about a class; a function's subject is who calls it.
        half = FRAGMENTS if name.rpartition(".")[2][0].isupper() else FRAGMENTS + NOUNS
        assert docstring is None or not docstring.startswith(half), f"{name}: {docstring.splitlines()[0]}"
