"""The last collectives of every rank, for the day on which ranks do not meet: torch's flight recorder."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

import torch
import torch.distributed as dist


def record_collectives(folder: Path, entries: int, environ: MutableMapping[str, str]) -> None:
    """Let torch remember the last ``entries`` collectives of this process; call before the ranks meet.

    NCCL's own time-out writes them to ``folder/rank_<rank>``, which must exist then (a pickle, for
    ``torch.distributed.flight_recorder``). Variables of torch that are set already are left alone.
    """
    environ.setdefault("TORCH_FR_BUFFER_SIZE", str(entries))
    environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", str(int(entries > 0)))
    environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "rank_"))


def write_collectives(folder: Path, rank: int) -> Path:
    """Write what was remembered to ``folder/rank_<rank>.json``; any thread may call, whatever the others wait for."""
    c10d = torch._C._distributed_c10d  # torch has no public name for it
    dump = c10d._dump_nccl_trace_json if dist.get_backend() == "nccl" else c10d._dump_fr_trace_json  # type: ignore[attr-defined]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{rank}.json"
    path.write_bytes(dump(True, False))
    return path
