"""Every cache of the package is bounded, and clear_caches empties it."""

import ast
import gc
import pkgutil
import weakref
from importlib import import_module
from pathlib import Path

import pytest
import torch

import longnet_dist
from longnet_dist import DilatedPattern, clear_caches, dilated_attention
from longnet_dist.caches import bounded_cache

ROOT = Path(longnet_dist.__file__).parent
FILES = sorted(file for file in ROOT.rglob("*.py") if file.name != "caches.py")


def unbounded(source):
    """Names of functools that keep results without this package's decorator."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "functools":
            yield from {alias.name for alias in node.names} & {"cache", "lru_cache"}
        if isinstance(node, ast.Attribute) and node.attr in {"cache", "lru_cache"} and isinstance(node.value, ast.Name):
            yield from [node.attr] * (node.value.id == "functools")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_other_decorator_keeps_results(file):
    source = file.read_text(encoding="utf-8")
    assert not list(unbounded(source)), "use longnet_dist.caches.bounded_cache"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "bounded_cache":
            (size,) = [keyword.value for keyword in node.keywords if keyword.arg == "maxsize"]
            assert isinstance(size, ast.Constant)
            assert 1 <= size.value <= 1024
        if isinstance(node, ast.FunctionDef) and file != ROOT / "caches.py":
            for inner in ast.walk(node):
                decorators = inner.decorator_list if isinstance(inner, ast.FunctionDef) and inner is not node else []
                assert not any("bounded_cache" in ast.dump(decorator) for decorator in decorators), "a cache a call"


@pytest.mark.parametrize(
    "source", ["from functools import cache", "import functools\n@functools.lru_cache\ndef f(): 0"]
)
def test_the_search_finds_them(source):
    assert list(unbounded(source))


def caches():
    """All caches of the modules that can be imported here, but those of other packages, such as urlsplit."""
    for module in pkgutil.walk_packages([str(ROOT)], "longnet_dist."):
        try:
            found = vars(import_module(module.name)).items()
        except ImportError:  # a package of a GPU that is absent here
            continue
        kept = ((name, value) for name, value in found if hasattr(value, "cache_info"))
        yield from ((f"{module.name}.{name}", x) for name, x in kept if x.__module__.startswith("longnet_dist."))


def test_all_caches_are_emptied_and_results_stay():
    pattern = DilatedPattern([16, 32], [1, 2])
    q, k, v = (torch.randn(1, 48, 4, 8) for _ in range(3))
    before = dilated_attention(q, k, v, pattern)
    found = dict(caches())
    assert len(found) >= 20
    assert all(cached.cache_info().maxsize for cached in found.values())
    assert sum(cached.cache_info().currsize for cached in found.values()) > 5
    clear_caches()
    assert {name: cached.cache_info().currsize for name, cached in found.items()} == dict.fromkeys(found, 0)
    assert torch.equal(dilated_attention(q, k, v, pattern), before)


def test_tensors_are_freed():
    @bounded_cache(maxsize=2)
    def table(size):
        return torch.zeros(size)

    references = [weakref.ref(table(size)) for size in (3, 4, 5)]
    gc.collect()
    assert [reference() is None for reference in references] == [True, False, False]
    assert table(5) is references[2]()
    clear_caches()
    gc.collect()
    assert all(reference() is None for reference in references)
