"""What to change when the memory is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longnet_dist.errors import LongNetError
from longnet_dist.estimate.devices import GIB
from longnet_dist.estimate.run_estimate import Estimate
from longnet_dist.estimate.table import remedy_lines, table

# What torch's CPU allocator and its check of sizes say; they have no exception class of their own.
_CPU_MESSAGES = ("DefaultCPUAllocator", "Storage size calculation overflowed", "numel: integer multiplication overflow")


@contextmanager
def explained(rank: int, plan: Estimate) -> Iterator[None]:
    """Turn out-of-memory errors inside into one that says what the memory was planned for, and what to change.

    Args:
        rank: of this process.
        plan: of the run.

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
        held = f"; tensors held {_gib(torch.cuda.max_memory_allocated())} at most" if torch.cuda.is_available() else ""
        raise LongNetError(
            f"rank {rank} is out of memory ({reason}{held})\n\n{table(plan)}\n\n{remedy_lines(plan)}"
        ) from None


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
