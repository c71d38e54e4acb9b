"""An out-of-memory error is explained by the estimate of the run, with settings that need less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longnet_dist.errors import LongNetError, is_out_of_memory
from longnet_dist.estimate.devices import GIB
from longnet_dist.estimate.run_estimate import Estimate
from longnet_dist.estimate.table import remedy_lines, table


@contextmanager
def explained(rank: int, estimate: Estimate) -> Iterator[None]:
    """Turn out-of-memory errors inside the context into one with the estimated memory and settings that need less.

    Args:
        rank: rank of this process.
        estimate: estimate of the run.

    Raises:
        LongNetError: the memory of the device or of the machine is full.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or "no memory left").splitlines()[0]
        peak = f"; tensors held {_gib(torch.cuda.max_memory_allocated())} at most" if torch.cuda.is_available() else ""
        raise LongNetError(
            f"rank {rank} is out of memory ({reason}{peak})\n\n{table(estimate)}\n\n{remedy_lines(estimate)}"
        ) from None


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
