"""Results that are kept for later calls of a function: each cache is bounded, and all can be emptied at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper

Result = TypeVar("Result")

_CLEAR: list[Callable[[], None]] = []


def bounded_cache(maxsize: int) -> Callable[[Callable[..., Result]], _lru_cache_wrapper[Result]]:
    """Return a decorator that keeps the last results of a function of a module.

    The package uses no other decorator that keeps results, so that :func:`clear_caches` empties all.

    Args:
        maxsize: number of results, at least 1; the one that was not used for the longest time is dropped.
    """

    def decorate(function: Callable[..., Result]) -> _lru_cache_wrapper[Result]:
        cached = lru_cache(maxsize=maxsize)(function)
        _CLEAR.append(cached.cache_clear)
        return cached

    return decorate


def clear_caches() -> None:
    """Empty the package's caches: geometry, plans, launches, tensors on devices, compiled functions.

    Results stay what they are. The next calls compute again what was kept, and compiled functions are compiled again.
    Call it to free device memory behind a model or stream that is not used any more, not during a call.
    """
    for clear in _CLEAR:
        clear()
