"""The errors a user, a file or a cluster can cause.

Each message gives the rule, the offending values and the remedy. The command ``longnet`` prints it without a
traceback and exits with status 2 (69 for a lost rank); anything else that escapes is a fault of this package.
"""

import re

USER_ERROR_STATUS = 2
LOST_RANK_STATUS = 69  # EX_UNAVAILABLE: another rank was killed, hangs or broke; start again to go on
REQUEUE_STATUS = 75  # EX_TEMPFAIL: asked to stop, a checkpoint is written, start again to go on
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells count
READER_ENDED_STATUS = 141  # 128 + SIGPIPE: what reads the output, such as head, has ended


class LongNetError(Exception):
    """Base of all errors that the caller can mend."""


class LostRankError(LongNetError):
    """Another rank was killed, hangs or broke: nothing the caller did, and the same command goes on."""


class ConfigError(LongNetError, ValueError):
    """A configuration, a dilated pattern or a mesh that cannot work."""


class MissingExtraError(LongNetError, ImportError):
    """A package that only an extra of the distribution brings, and that is not installed."""


class ShapeError(LongNetError, ValueError):
    """Tensors whose shape, dtype or device do not fit together."""


class DataError(LongNetError, ValueError):
    """A corpus or token file that is missing, damaged or does not fit the model."""


class CheckpointError(LongNetError, ValueError):
    """A checkpoint that is missing, damaged or of another model."""


def is_missing_compiler(error: BaseException) -> bool:
    """Say whether torch or Triton found no compiler for C or C++, by their messages."""
    return any(message in str(error) for message in ("No working C++ compiler found", "Failed to find C compiler"))


def refused_object(error: BaseException) -> str | None:
    """Return the name of the object for which ``torch.load`` refused a file of tensors, by its message; else None."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found[1] if found else None


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory ran out, by name and message, since torch's CPU allocator raises a plain RuntimeError."""
    messages = ("DefaultCPUAllocator", "Storage size calculation overflowed", "numel: integer multiplication overflow")
    named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return named or (isinstance(error, RuntimeError) and any(message in str(error) for message in messages))
