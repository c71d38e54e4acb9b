"""Being asked to stop: by a scheduler that wants the machine back, or by its time limit."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Windows has no SIGUSR1.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Note ``STOP_SIGNALS`` instead of ending at once; yields a function that says whether one came.

    Schedulers and launchers often send several, so a second one is no sign of haste: once one came, those that come
    after the context are ignored, for the process is about to end. Only for the main thread.
    """
    came: list[int] = []
    old = {number: signal.signal(number, lambda number, _: came.append(number)) for number in STOP_SIGNALS}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in old.items():
            signal.signal(number, signal.SIG_IGN if came else handler)
