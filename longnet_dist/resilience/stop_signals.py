"""A scheduler asks a run to stop, to take the machine back or at its time limit, by a signal."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Windows has no SIGUSR1.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Record ``STOP_SIGNALS`` instead of ending at once; yield a function that says whether one came.

    Schedulers and launchers often send several, so a second signal does not end the process either. If one came, later
    ones are ignored even after the context, since the process is about to end. Only the main thread may enter.
    """
    came: list[int] = []
    old = {number: signal.signal(number, lambda number, _: came.append(number)) for number in STOP_SIGNALS}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in old.items():
            signal.signal(number, signal.SIG_IGN if came else handler)
