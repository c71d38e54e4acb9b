"""Run a function on several gloo ranks of this machine."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

HANG_SECONDS = 600


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_seconds: float = 120.0,
    start_method: Literal["fork", "spawn"] = "fork",
) -> list[Any]:
    """Results of ``fn(*args)`` on ranks ``0 … world_size-1`` of a gloo world; raises if a rank did.

    Processes are forked, so that all imports are already done, and meet at a file: about 0.1 s a call. Spawned ones
    take seconds, and have nothing of what this process did before.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (fn, world_size, folder, args, timeout_seconds)
        ranks = start_processes(_run, arguments, world_size, join=False, start_method=start_method)
        deadline = time.monotonic() + HANG_SECONDS
        while not ranks.join(timeout=10):
            if time.monotonic() > deadline:
                for process in ranks.processes:
                    process.kill()
                raise TimeoutError(f"ranks of {fn} did not end in {HANG_SECONDS} s")
        return [torch.load(Path(folder) / f"result{rank}", weights_only=False) for rank in range(world_size)]


def _run(
    rank: int, fn: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...], timeout_seconds: float
) -> None:
    torch.set_num_threads(1)
    # accelerate and our own launches choose more threads otherwise, and OpenMP hangs with them in a forked process.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=timeout_seconds), rank=rank, world_size=world_size
    )
    try:
        torch.save(fn(*args), Path(folder) / f"result{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()
