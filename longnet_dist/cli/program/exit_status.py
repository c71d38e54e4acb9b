"""How a command ends: one line for a mistake of the caller, a traceback for a fault of this package."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

from longnet_dist.cli.program.messages import messages_beside_bars
from longnet_dist.errors import (
    INTERRUPTED_STATUS,
    LOST_RANK_STATUS,
    READER_ENDED_STATUS,
    USER_ERROR_STATUS,
    LongNetError,
    LostRankError,
    is_missing_compiler,
    is_out_of_memory,
)


def run_cli(main: Callable[[], None]) -> None:
    """Run ``main()`` and exit with status 2 and the bare message if it raises a ``LongNetError`` or an ``OSError``.

    The status is 69 for a ``LostRankError``, which is no mistake of the caller's.

    An ``OSError`` that comes this far is one of the disk or the machine: no space, no permission, no such device. A
    missing package of others ends with the line that installs it. Any other exception is a fault of this package and
    keeps its traceback. An interrupt (Ctrl-C) exits with 130. Where the reader of the output ends first, as
    ``head`` does, the status is 141 and there is no message. Memory or a compiler that is not there ends with
    status 2.
    """
    _show_anything()
    try:
        with messages_beside_bars():
            main()
        sys.stdout.flush()
    except LongNetError as error:
        # One write, so that the messages of several ranks do not run into each other.
        sys.stderr.write(f"error: {error}\n")
        sys.exit(LOST_RANK_STATUS if isinstance(error, LostRankError) else USER_ERROR_STATUS)
    except BrokenPipeError:
        # What is still buffered would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(READER_ENDED_STATUS)
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or 'the system'}: {error.strerror or error}\n")
        sys.exit(USER_ERROR_STATUS)
    except (MemoryError, RuntimeError) as error:
        message = _lacking(error)
        if not message:
            raise
        sys.stderr.write(f"error: {message}\n")
        sys.exit(USER_ERROR_STATUS)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "longnet_dist"):
            raise
        sys.stderr.write(
            f"error: this command needs the package {package}, which is not installed; "
            "install it with: pip install 'longnet-dist[train]'\n"
        )
        sys.exit(USER_ERROR_STATUS)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED_STATUS)


def _lacking(error: Exception) -> str:
    """Return what to tell of an error if the machine lacks memory or a compiler, else an empty string."""
    if is_out_of_memory(error):
        return f"out of memory: {(str(error) or 'none is left').splitlines()[0]}; ask for less"
    if is_missing_compiler(error):
        return (
            "compiled and Triton kernels need a compiler for C and C++, and there is none; install one (gcc and g++), "
            "name it in CC and CXX, or on a CPU use train.compile=false"
        )
    return ""


def _show_anything() -> None:
    """Let the terminal show what it has no characters for as escapes, instead of an error that ends a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
