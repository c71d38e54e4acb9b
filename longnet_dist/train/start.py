"""The start of a run: every rank checks what it sees, the ranks compare it, and rank 0 takes the run's folder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from longnet_dist.attention.kernels.planning import planned_device
from longnet_dist.checkpoint.identity import code_versions, digest_of
from longnet_dist.checkpoint.lock import Lock, held_by_first, read_owner
from longnet_dist.comm.agreement import agreed, settle
from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.config.schema import Config
from longnet_dist.data.token_file import TokenFile
from longnet_dist.errors import ConfigError
from longnet_dist.estimate.run_estimate import Estimate
from longnet_dist.estimate.table import check_fits
from longnet_dist.machine import host_memory_bytes
from longnet_dist.ops.compile_cache import prepare_compile_cache
from longnet_dist.train.setup import RunSetup

# A network file system may remember for half a minute that a file was not there.
APPEARS_SECONDS = 35.0


class Start:
    """A Start is what one rank knows before it meets the others.

    Args:
        config: the run.
        launch: which process this one is.
        verify: compare the checksums of the token file, on one rank of each machine.

    Attributes:
        plan: the checked configuration.
        device: of this rank.
        needs: the estimated memory and time.

    Raises:
        LongNetError: whatever would make the run fail later.
    """

    def __init__(self, config: Config, launch: LaunchEnvironment, verify: bool = False) -> None:
        if verify and config.data.path is not None and launch.local_rank == 0:
            TokenFile.open(config.data.path, verify=True)  # that of the default corpus always is
        prepare_compile_cache(config.train.compile_cache, os.environ)
        self.device: torch.device = launch.device()
        self.plan = RunSetup.make(config, launch.world_size, self.device.type)
        on_device = planned_device(self.device, self.plan)
        self.needs = Estimate.of(self.plan, on_device, launch.local_world_size, host_memory_bytes())
        check_fits(self.needs)

    def facts(self) -> dict[str, str]:
        """Return what must be equal on all ranks, by name."""
        plan = self.plan
        state, init, code = plan.resume.state, plan.init, code_versions()
        facts = {f"the version of {name}": version for name, version in code.items()}
        facts |= {"the device": self.device.type, "the number of ranks": str(plan.num_ranks)}
        facts["the checkpoint to go on from"] = f"step {state.step} ({digest_of(state.sha256)})" if state else "none"
        facts["the weights to begin with"] = init.sha256 if init else "none"
        return facts if plan.token_file is None else facts | plan.identity(plan.token_file).facts()


@contextmanager
def own_folder(plan: RunSetup, device: torch.device, launch: LaunchEnvironment, store: Any) -> Iterator[None]:
    """Lock the run's folder for this run, and check that all ranks see the same folder. Every rank must enter.

    Args:
        plan: of the run.
        device: of this rank.
        launch: which process this one is.
        store: rendezvous store of the run.

    Raises:
        ConfigError: another run uses the folder, or a rank sees another folder; on all ranks.
    """
    lock = Lock(plan.folder.path / "run.lock", f"train.output_dir={plan.folder.path}")
    with held_by_first(lock, launch, store):
        nonce = settle(store, launch, "nonce", lock.owner.nonce, lambda nonces: str(nonces[0]))
        if plan.config.train.checkpoint_every:
            agreed(store, launch, "folder", lambda: _check_shared(plan.folder.path, lock.path, nonce), lambda _: {})
        if device.type == "cuda":
            plan.folder.flight_recorder.mkdir(exist_ok=True)  # NCCL's own time-out writes there, and makes no folder
        yield


def _check_shared(folder: Path, lock: Path, nonce: str | None) -> None:
    """Refuse a folder in which the lock of rank 0 does not appear."""
    deadline = time.monotonic() + APPEARS_SECONDS
    while (owner := read_owner(lock)) is None or owner.nonce != nonce:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"train.output_dir={folder} is not the folder that rank 0 uses: its file {lock.name} does not appear "
                "here; all hosts must share the folder, so use one on a shared file system"
            )
        time.sleep(0.2)
