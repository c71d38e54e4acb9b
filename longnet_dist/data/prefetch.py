"""A thread reads the next chunk of a text while the current one is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Yield ``(item, read(item))`` for every item in order, while a thread reads one item ahead.

    Args:
        read: called in the thread; an exception of it is raised here, at its item.
        items: what to read.
    """
    with ThreadPoolExecutor(1) as thread:
        previous = None
        for item in items:
            following = item, thread.submit(read, item)
            if previous:
                yield previous[0], previous[1].result()
            previous = following
        if previous:
            yield previous[0], previous[1].result()
