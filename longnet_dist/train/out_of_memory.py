"""What to change when the memory is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longnet_dist.errors import LongNetError

# What torch's CPU allocator and its check of sizes say; they have no exception class of their own.
_CPU_MESSAGES = ("DefaultCPUAllocator", "Storage size calculation overflowed", "numel: integer multiplication overflow")


@contextmanager
def remedies(rank: int, settings: str) -> Iterator[None]:
    """Turn out-of-memory errors inside into one that says what to change.

    Args:
        rank: of this process.
        settings: the keys that decide how much memory is needed, with their values.

    Raises:
        LongNetError: the memory of the device or of the machine is full.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(message in str(error) for message in _CPU_MESSAGES):
            raise
        reason = (str(error) or "no memory left").splitlines()[0]
        raise LongNetError(
            f"rank {rank} is out of memory with {settings}; use a smaller train.micro_batch_size or "
            f"train.chunk_length, a higher deepspeed.zero_stage, more ranks with a larger parallel.sequence, or a "
            f"smaller model ({reason})"
        ) from None
