"""What Gluon calls differently from one release of Triton to the next. No other file depends on the release.

Device functions of Triton 3.6 to 3.9 (``support.FIRST_RELEASE``, ``LAST_RELEASE``). A name is looked up by what the
installed Triton has, the newest name first: an old one may be left there to raise.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma


def _first(module: Any, *names: str) -> Any:
    """The first of ``names`` that ``module`` has."""
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise ImportError(f"{module.__name__} of this Triton has none of {', '.join(names)}")


group_barrier = _first(gl, "barrier", "thread_barrier")
"""Wait for all threads of the group of warps that runs this."""
fetch_block = _first(tma, "async_load", "async_copy_global_to_shared")
"""Let the copy engine read a block: ``(descriptor, position, barrier, target)``."""
store_block = _first(tma, "async_store", "async_copy_shared_to_global")
"""Let the copy engine write a block: ``(descriptor, position, source)``."""
fetch_elements = _first(async_copy, "async_load", "async_copy_global_to_shared")
"""Let the threads copy elements to shared memory: ``(target, pointers, mask)``."""
_reinterpret = _first(gl.shared_memory_descriptor, "reinterpret", "_reinterpret")


@builtin
def reinterpret(tile, dtype, shape, layout, _semantic=None):
    """``tile`` in shared memory as one of another dtype, shape or layout."""
    return _reinterpret(tile, dtype, shape, layout, _semantic=_semantic)
