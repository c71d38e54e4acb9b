"""What this machine offers: cores, memory, and the memory of this process. Runs without POSIX, too."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from longnet_dist.errors import ConfigError

STATUS = Path("/proc/self/status")
CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return the number of cores that this process may use, at least 1; where the system cannot say, all of them.

    Its control groups may leave it the time of fewer cores than it may run on.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [folder / "cpu.max" for folder in _groups("cpu")]  # version 2: quota and period, us
    words = [words for file in quotas if len(words := _words(file)) == 2]
    for folder in _groups("cpu"):  # version 1
        words.append(_words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"))
    shares = [int(pair[0]) / int(pair[1]) for pair in words if len(pair) == 2 and all(map(str.isdecimal, pair))]
    return max(1, int(min([cores, *shares])))


def user_threads(environ: Mapping[str, str]) -> int | None:
    """Return the number of threads that the user asks for with ``OMP_NUM_THREADS``, None if there is none.

    torchrun sets it to 1 for all its ranks where the user does not, so a 1 of its ranks counts as not set.

    Args:
        environ: the environment variables.
    """
    text = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is one number for each level of nesting
    is_number = text.isascii() and text.isdecimal() and len(text) < 10  # more are none for OpenMP and torch either
    number = int(text) if is_number else 0
    return None if number == 0 or (number == 1 and "TORCHELASTIC_RUN_ID" in environ) else number


def host_memory_bytes() -> int:
    """Return the bytes of this machine's memory, or what its control groups leave of them.

    Raises:
        ConfigError: the system does not say, as Windows.
    """
    if not hasattr(os, "sysconf"):
        raise ConfigError(
            f"this system ({sys.platform}) does not say how much memory it has; plan for a GPU by its name instead: "
            "--device h100"
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    names = ("memory.max", "memory.limit_in_bytes")  # of version 2 and 1; without a limit "max" and a huge number
    words = [_words(folder / name) for folder in _groups("memory") for name in names]
    return min([memory, *(int(limit[0]) for limit in words if limit and limit[0].isdecimal())])


def check_writable(folder: Path, name: str) -> None:
    """Refuse a folder in which nothing can be written, as far as can be known without writing.

    Args:
        folder: which need not exist.
        name: of the setting that leads there, for the message.

    Raises:
        ConfigError: it, or the nearest one above it that exists, is none or cannot be written.
    """
    try:
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise ConfigError(f"{name} cannot be used: {error.strerror}") from None
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        fault = "cannot be written" if place.is_dir() else "is no folder"
        raise ConfigError(f"{name} cannot be used: {place} {fault}; use another folder")


def check_writable_file(file: Path, name: str) -> None:
    """Refuse a file that cannot be written, as far as can be known without writing.

    Args:
        file: which need not exist, nor its folder.
        name: of the setting that names it, for the message.

    Raises:
        ConfigError: it is a folder, or its own folder cannot be written.
    """
    if file.is_dir():
        raise ConfigError(f"{name} must be a file, but is a folder; give a file in it")
    check_writable(file.parent, name)


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the control groups of this process, inner ones first, for both versions.

    In a container the path may be that of the host, of which only the last folder above it is there.
    """
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        lines = []
    yield CGROUPS  # version 2 in a container
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount in {CGROUPS / controllers, CGROUPS / controller} if controllers else {CGROUPS, CGROUPS / "unified"}:
            inner = PurePosixPath(path.lstrip("/"))
            yield from (mount / part for part in (inner, *inner.parents))


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def cpu_name() -> str:
    """Return the name of this machine's processor; an empty string where the system does not say."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def peak_resident_bytes() -> int | None:
    """Return the most memory that this process has had resident, bytes; None where the system does not say."""
    # Linux counts what the process had before it began this program, too, in getrusage: the peak of its parent.
    words = _words(STATUS)
    if "VmHWM:" in words:
        return int(words[words.index("VmHWM:") + 1]) * 1024
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
