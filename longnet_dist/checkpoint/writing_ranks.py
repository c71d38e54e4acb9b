"""The ranks that write a checkpoint together tell each other through the rendezvous store how far they are."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

POLL_SECONDS = 0.02
MAX_POLL_SECONDS = 1.0
WRITE_ERRORS = (OSError, SafetensorError)


class WritingRanks:
    """The WritingRanks write one checkpoint after another, each in a round; every one must begin each round.

    No collective is needed, so threads may write while the main threads train.

    Args:
        store: rendezvous store of the run, or None for a rank that writes alone.
        rank: of this process.
        size: number of ranks that write.
        timeout_seconds: for which a rank waits for another one.

    Attributes:
        makes_folder: whether the folder of the checkpoints may have to be made.
        makes_parents: whether the run's folder may have to be made, too.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout_seconds: float) -> None:
        # A connection of its own: requests of the main thread neither wait for this thread nor delay it.
        self._store = dist.HashStore() if size == 1 else store.clone()  # type: ignore[attr-defined]
        self.rank, self.size, self._timeout, self._round = rank, size, timeout_seconds, 0
        self._remembered = 1  # the first round whose messages are kept
        self.makes_folder = self.makes_parents = True
        self._given_up = threading.Event()

    @classmethod
    def alone(cls) -> WritingRanks:
        """Return one rank that writes whole checkpoints."""
        return cls(None, 0, 1, 0.0)

    def give_up(self) -> None:
        """Let the thread that writes not wait for other ranks any more, since this rank ends."""
        self._given_up.set()

    @property
    def has_given_up(self) -> bool:
        """Say whether the rank ends."""
        return self._given_up.is_set()

    def begin(self) -> None:
        """Begin a round."""
        self._round += 1

    def told(self, what: str, tell: Callable[[], str]) -> str:
        """Return what rank 0 says, on every rank.

        Args:
            what: is asked, another question each time in a round.
            tell: is called on rank 0.

        Raises:
            OSError, SafetensorError: on rank 0 what ``tell`` raises.
            OSError: on another rank the same, or rank 0 does not answer.
        """
        if self.rank != 0:
            deadline = time.monotonic() + 2 * self._timeout  # rank 0 may be waiting for another rank
            return str(self._value(what, self._hear(what, deadline)))
        try:
            value = tell()
        except WRITE_ERRORS as error:
            self._say(what, {"error": str(error)})
            raise
        self._say(what, {"value": value})
        return value

    def say_part(self, write: Callable[[], dict[str, str]]) -> None:
        """Write the part of this rank, and say its checksums or why it could not be written."""
        try:
            said: dict[str, Any] = {"value": write()}
        except WRITE_ERRORS as error:
            place = f"rank {self.rank} on host {socket.gethostname()}: " if self.size > 1 else ""
            said = {"error": f"{place}{error}"}
        self._say(f"part/{self.rank}", said)

    def checksums(self) -> dict[str, str]:
        """Return the checksums of the parts of all ranks, by file name; for rank 0.

        A fault is raised only when no rank is writing any more, or all have had time enough.

        Raises:
            OSError: a rank could not write its part, or does not answer.
        """
        deadline, names = time.monotonic() + self._timeout, [f"part/{rank}" for rank in range(self.size)]
        heard = {name: self._hear(name, deadline) for name in names}
        if None not in heard.values():
            self._forget()
        parts = [self._value(name, message) for name, message in heard.items()]
        return {name: sha256 for part in parts for name, sha256 in part.items()}

    def _forget(self) -> None:
        """Forget the rounds before this one: every rank has said its part in this one, so it has heard their ends."""
        with suppress(RuntimeError):  # some stores cannot forget
            for number in range(self._remembered, self._round):
                for what in ("folder", "end", *(f"part/{rank}" for rank in range(self.size))):
                    self._store.delete_key(f"checkpoint/{number}/{what}")
        self._remembered = self._round

    def _say(self, what: str, message: dict[str, Any]) -> None:
        self._store.set(f"checkpoint/{self._round}/{what}", json.dumps(message))

    def _hear(self, what: str, deadline: float) -> dict[str, Any] | None:
        """Return a message, or None if there is none at the deadline, in seconds of the monotonic clock.

        Asking again and again leaves the store free for others.
        """
        key, pause = f"checkpoint/{self._round}/{what}", POLL_SECONDS
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                return None
            if self._given_up.wait(pause):
                raise OSError("this rank ends")
            pause = min(2 * pause, MAX_POLL_SECONDS)
        message: dict[str, Any] = json.loads(self._store.get(key))
        return message

    def _value(self, what: str, message: dict[str, Any] | None) -> Any:
        """Return the value in a message, or raise the error in it, or that there is none."""
        if message is None:
            raise TimeoutError(f"no answer ({what}) for more than {self._timeout:.0f} s from a rank that writes")
        if "error" in message:
            raise OSError(message["error"])
        return message["value"]
