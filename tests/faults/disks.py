"""File systems that are too small, for runs that write into them."""

import subprocess
from contextlib import contextmanager, suppress


@contextmanager
def small_disk(folder, megabytes):
    """A folder, on a small file system of its own if this process may mount one; and whether it is."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    is_small = not subprocess.run(command, capture_output=True).returncode
    try:
        yield folder, is_small
    finally:
        if is_small:
            subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def full(disk):
    """Fill a small file system, and make room again."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()
