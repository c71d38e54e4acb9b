"""A lock keeps two processes from writing the same files."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel, ValidationError

from longnet_dist.comm.agreement import agreed
from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.errors import ConfigError
from longnet_dist.machine import process_start

BEAT_SECONDS = 5.0
SILENT_BEATS = 3  # after which a lock of another machine, whose processes cannot be seen, is stale


class Owner(BaseModel):
    """The Owner is what a lock file says about the process that has it.

    Attributes:
        host: name of its machine.
        namespace: its process namespace, since containers may share a host name.
        pid: its process id.
        started: start time of the process in the host's own units; None if unknown.
        nonce: tells this lock from all others.
    """

    host: str
    namespace: str
    pid: int
    started: int | None
    nonce: str

    @classmethod
    def of_this_process(cls) -> Self:
        """Describe this process, with a new nonce."""
        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            namespace=_namespace(),
            pid=pid,
            started=process_start(pid),
            nonce=secrets.token_hex(8),
        )

    def has_ended(self) -> bool | None:
        """Say whether the process has ended; None if this machine cannot know."""
        if (self.host, self.namespace) != (socket.gethostname(), _namespace()) or self.started is None:
            return None
        return process_start(self.pid) != self.started


class Lock:
    """A Lock is a file that exists while a process uses what it protects. It is a context manager.

    A lock whose process was killed is stale, and is taken over with a message. On the same machine the process tells.
    The lock of another machine is stale if its file is not touched for 15 seconds, as its owner does every 5.

    Args:
        path: of the lock file; its folder is made, and removed with the lock if nothing else was written into it.
        what: is protected, as the message names it, with the key or option that selects it.

    Attributes:
        owner: what the file says about this process.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self._what = path, what
        self.owner = Owner.of_this_process()
        self._released = threading.Event()
        self._made: list[Path] = []  # folders that were not there before, the innermost first

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            ConfigError: another process has it, or it cannot be written.
        """
        try:
            folder = self.path.parent
            self._made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._take_stale()
        except OSError as error:
            raise ConfigError(
                f"{self._what} cannot be locked: {self.path}: {error.strerror or error}; remove what is in the way, or "
                "use another place"
            ) from None
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._released.set()
        with suppress(OSError):
            if read_owner(self.path) == self.owner:
                self.path.unlink()
            for folder in self._made:
                folder.rmdir()  # which fails where something was written into it

    def _create(self) -> bool:
        """Make the file; say whether there was none."""
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(self.owner.model_dump_json())
        except FileExistsError:
            return False
        return True

    def _take_stale(self) -> None:
        """Remove the lock of a process that has ended, and say so.

        Raises:
            ConfigError: the process has not ended.
        """
        touched = _touched(self.path)
        owner = read_owner(self.path)
        ended = owner.has_ended() if owner else None
        if ended is None:
            time.sleep(SILENT_BEATS * BEAT_SECONDS)
            ended = _touched(self.path) == touched
            owner = read_owner(self.path)  # which another process may only now have written
        who = f"process {owner.pid} on host {owner.host}" if owner else "another process"
        if not ended:
            raise ConfigError(
                f"{self._what} is in use by {who} (lock file {self.path}); wait until it ends, or use another place"
            )
        # Whoever renames the file may remove it; a lock that was taken meanwhile is put back.
        aside = self.path.with_name(f"{self.path.name}.{self.owner.nonce}")
        with suppress(FileNotFoundError):
            self.path.rename(aside)
            if read_owner(aside) != owner:
                aside.rename(self.path)
                return
            aside.unlink()
            print(f"took over the lock of {self._what}: {who} has ended without releasing it", file=sys.stderr)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OSError):  # a file system that is away for a while
                os.utime(self.path)


@contextmanager
def held_by_first(lock: Lock, launch: LaunchEnvironment, store: Any) -> Iterator[None]:
    """Hold a lock on rank 0 while all ranks are inside. Every rank must enter.

    Args:
        lock: to hold.
        launch: which process this one is.
        store: rendezvous store of the run.

    Raises:
        ConfigError: another process has it, or it cannot be written; on all ranks.
    """
    with ExitStack() as stack:
        take = partial(stack.enter_context, lock) if launch.rank == 0 else lambda: None
        agreed(store, launch, "lock", take, lambda _: {})
        yield


def read_owner(path: Path) -> Owner | None:
    """Return the owner of a lock file, None if there is no such file or it is being written or damaged."""
    try:
        return Owner.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None


def _touched(path: Path) -> int | None:
    try:
        with path.open("rb") as file:  # opening makes a network file system ask its server
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
