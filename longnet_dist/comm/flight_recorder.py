"""Torch's flight recorder remembers the last collectives of every rank, to show on which one a run hangs."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

import torch.distributed as dist

from longnet_dist.private_interfaces import recorded_collectives


def record_collectives(folder: Path, entries: int, environ: MutableMapping[str, str]) -> None:
    """Let torch record the last ``entries`` collectives of this process.

    Call it before the process group is made, which reads these variables. When a collective of NCCL times out, torch
    writes the record to ``folder/rank_<rank>``, a pickle for ``torch.distributed.flight_recorder``; ``folder`` must
    exist by then.

    Args:
        folder: where NCCL's time-out writes the record.
        entries: number of collectives to remember; 0 records none.
        environ: the environment to change; variables that the user has set keep their value.
    """
    environ.setdefault("TORCH_FR_BUFFER_SIZE", str(entries))
    environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", str(int(entries > 0)))
    environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "rank_"))


def write_collectives(folder: Path, rank: int) -> Path:
    """Write the recorded collectives to ``folder/rank_<rank>.json`` and return this path.

    Any thread may call it, also while another one hangs in a collective.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{rank}.json"
    path.write_bytes(recorded_collectives(nccl=dist.get_backend() == "nccl"))
    return path
