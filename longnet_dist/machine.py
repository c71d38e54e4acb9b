"""What this machine offers: cores, memory, and the memory of this process. Runs without POSIX, too."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from longnet_dist.errors import ConfigError

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def usable_cores() -> int:
    """Return the number of cores that this process may run on; where the system cannot say, all of them."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def host_memory_bytes() -> int:
    """Return the bytes of this machine's memory, or what its control group leaves of them.

    Raises:
        ConfigError: the system does not say, as Windows.
    """
    if not hasattr(os, "sysconf"):
        raise ConfigError(
            f"this system ({sys.platform}) does not say how much memory it has; plan for a GPU by its name instead: "
            "--device h100"
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    return memory if text == "max" else min(memory, int(text))


def peak_resident_bytes() -> int | None:
    """Return the most memory that this process has had resident, bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def process_start(pid: int) -> int | None:
    """Return the start time of a process on this machine, in clock ticks since boot.

    It tells the process from a later one with the same id. It is None if the process has ended, even if its parent has
    not noticed yet, and on systems without ``/proc``.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in parentheses may contain spaces; the state is field 3 of proc(5), the start time field 22.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
