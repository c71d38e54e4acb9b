"""A scheduler or a person asks a run to stop, by a signal."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# Windows has neither SIGUSR1 nor SIGHUP.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP") if hasattr(signal, name)
)


def heeded_signals() -> list[signal.Signals]:
    """Return the signals that ask this process to stop.

    ``nohup`` ignores SIGHUP and a shell's background job SIGINT, and both mean it. Launchers and batch scripts ignore
    SIGUSR1 or SIGTERM only for themselves, but the ranks inherit that.
    """
    meant = (signal.SIGINT, getattr(signal, "SIGHUP", None))
    return [number for number in STOP_SIGNALS if number not in meant or signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def stop_requests(answer: str = "") -> Iterator[Callable[[], bool]]:
    """Record ``STOP_SIGNALS`` instead of ending at once; yield a function that says whether one came.

    Schedulers and launchers often send several, so a second signal does not end the process either; only a second
    Ctrl-C does. If one came, later ones are ignored even after the context, since the process is about to end. Only the
    main thread may enter.

    Args:
        answer: what the first signal writes to stderr, since the process may go on for a while.

    Raises:
        KeyboardInterrupt: at a second Ctrl-C.
    """
    came: list[int] = []

    def note(number: int, _: object) -> None:
        if number == signal.SIGINT and number in came:
            raise KeyboardInterrupt
        if answer and not came:
            with suppress(OSError):
                os.write(2, f"\n{answer}\n".encode())  # sys.stderr may be in the middle of a line, and refuse another
        came.append(number)

    old = {number: signal.signal(number, note) for number in heeded_signals()}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in old.items():
            signal.signal(number, signal.SIG_IGN if came else handler)


@contextmanager
def clean_ends() -> Iterator[None]:
    """Let every stop signal end the process as an exception, so that what is unfinished is removed, as at Ctrl-C.

    Only the main thread may enter.

    Raises:
        SystemExit: at a signal other than Ctrl-C, with the status 128 and its number, as without a handler.
    """
    signals = [number for number in heeded_signals() if number != signal.SIGINT]

    def end(number: int, _: object) -> None:
        for other in signals:
            signal.signal(other, signal.SIG_IGN)  # a second one must not interrupt the removal
        raise SystemExit(128 + number)

    old = {number: signal.signal(number, end) for number in signals}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
