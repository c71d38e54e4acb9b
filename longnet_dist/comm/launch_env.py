"""Who this process is among those of a run: read once, from what the launcher left in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from longnet_dist.errors import ConfigError

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class LaunchEnvironment:
    """The place of one process.

    Attributes:
        rank: number among all processes.
        world_size: how many there are.
        local_rank: number among those of its machine.
        local_world_size: how many there are on its machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> LaunchEnvironment:
        """What torchrun says, or a run of one process if it says nothing.

        Raises:
            ConfigError: only some of torchrun's variables are set, or one is no number.
        """
        given = [name for name in TORCHRUN_VARIABLES if name in environ]
        if "RANK" not in given and "WORLD_SIZE" not in given:
            return cls()
        if missing := [name for name in TORCHRUN_VARIABLES if name not in given]:
            raise ConfigError(
                f"the environment sets {', '.join(given)} but not {', '.join(missing)}; start the ranks with torchrun, "
                f"or unset {', '.join(given)} for a run of one process"
            )
        try:
            return cls(*(int(environ[name]) for name in TORCHRUN_VARIABLES[:4]))
        except ValueError as error:
            raise ConfigError(f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be numbers: {error}") from None

    def device(self) -> torch.device:
        """The GPU of this rank's machine that is its own, or the CPU where there is none.

        Raises:
            ConfigError: more ranks on the machine than GPUs.
        """
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_world_size > torch.cuda.device_count():
            raise ConfigError(
                f"every rank needs a GPU of its own, but {self.local_world_size} ranks share a machine with "
                f"{torch.cuda.device_count()}; use a smaller --nproc_per_node, or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
            )
        return torch.device("cuda", self.local_rank)

    def share_cores(self) -> None:
        """Let the ranks of a machine share its cores evenly; each would else start a thread on every core."""
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.local_world_size))


@contextmanager
def process_group(launch: LaunchEnvironment, device: torch.device, timeout: timedelta) -> Iterator[None]:
    """Join all processes of the run: NCCL between GPUs, gloo between CPUs. Every rank must enter.

    A run of one process needs neither an address nor a port.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.HashStore() if launch.world_size == 1 else None,  # type: ignore[attr-defined]
        timeout=timeout,
        rank=launch.rank,
        world_size=launch.world_size,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
