"""Which rank holds the others up: heartbeats through the rendezvous store."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from longnet_dist.cli import USER_ERROR_STATUS
from longnet_dist.errors import LongNetError

PACKAGE = Path(__file__).resolve().parents[1]
MAX_INTERVAL_SECONDS = 5.0
BEATS_IN_TIMEOUT = 20
SILENT_SHARE = 0.6  # of the time-out; the rest is for finding all silent ranks and for the main thread to end itself
FAILURE = "watchdog/failure"
REMEDY = "look for a process that is stopped or a machine that is lost, and go on with train.resume=auto"


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself every so often.

    Attributes:
        number: of the beat; a frozen process stops counting.
        host, pid: where the rank runs.
        at: the line of this package that its main thread is in.
    """

    number: int
    host: str
    pid: int
    at: str


class Watchdog:
    """Ends a run in which a rank does not answer, with the number of that rank.

    A thread of every rank writes a heartbeat into the store, reads that of the next rank, and looks whether a failure
    has been reported: three small requests a rank and interval, however many ranks there are. A second thread watches
    the first, whose requests wait for ever if the store's keeper is frozen. Every rank must enter and leave. A
    collective of the main thread cannot be interrupted, so a thread ends the process, with status 2.

    Args:
        store: the rendezvous store of the run.
        keeper: the process that keeps the store, in words.
        rank: of this process.
        world_size: number of ranks.
        timeout_seconds: within which a silent rank ends the run.
    """

    def __init__(self, store: Any, keeper: str, rank: int, world_size: int, timeout_seconds: float) -> None:
        self._store = store.clone()  # a connection of its own, so that requests of the main thread do not delay it
        self._keeper = keeper
        self._rank, self._world_size, self._timeout = rank, world_size, timeout_seconds
        self._interval = min(MAX_INTERVAL_SECONDS, timeout_seconds / BEATS_IN_TIMEOUT)
        self._main = threading.get_ident()
        self._number = 0
        self._ended = threading.Event()
        self._answered_at = time.monotonic()  # when the store last did
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._watch_ranks, self._watch_store)]

    def __enter__(self) -> Self:
        self._beat()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Report an error of this rank to the others; replace one that another rank caused by its explanation."""
        self._ended.set()
        for thread in self._threads:
            thread.join(self._patience)
        if isinstance(error, RuntimeError) and _is_of_communication(error):
            raise LongNetError(self._explain(error)) from None
        if error is not None and self._store_answers():
            self._report(f"rank {self._rank} failed: {error or type(error).__name__}")

    @property
    def _patience(self) -> float:
        """Seconds after which what happens in every interval is late."""
        return 3 * self._interval

    def _store_answers(self) -> bool:
        return time.monotonic() - self._answered_at < self._patience

    def _watch_ranks(self) -> None:
        neighbour = (self._rank + 1) % self._world_size
        last, changed_at = "", time.monotonic()
        while not self._ended.wait(self._interval):
            try:
                self._beat()
                failure, beat = self._failure(), self._read(neighbour)
                # If this process itself was stopped, its clock says nothing of the others.
                if beat != last or not self._store_answers():
                    last, changed_at = beat, time.monotonic()
                self._answered_at = time.monotonic()
                silent_seconds = self._answered_at - changed_at
                if not failure and silent_seconds > SILENT_SHARE * self._timeout:
                    failure = self._report(self._name_silent(silent_seconds))
            except RuntimeError as error:
                failure = f"{self._keeper}, which keeps the rendezvous store, has ended ({_first_line(error)})"
            if failure:
                self._end_unless_main_does(failure)

    def _watch_store(self) -> None:
        looked_at = time.monotonic()
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            if now - looked_at > self._patience:
                self._answered_at = now  # this process itself was stopped
            looked_at = now
            if now - self._answered_at > SILENT_SHARE * self._timeout:
                self._end_unless_main_does(
                    f"{self._keeper}, which keeps the rendezvous store, did not answer for "
                    f"{now - self._answered_at:.1f} s (parallel.timeout_minutes={self._timeout / 60:g}); {REMEDY}"
                )

    def _end_unless_main_does(self, message: str) -> None:
        """End the process, unless the main thread can end it with a message of its own, having seen the same."""
        if not self._ended.wait(self._patience):
            # On a line of its own, below the progress bar.
            sys.stderr.write(f"\nerror: rank {self._rank} ends the run: {message}\n")
            sys.stderr.flush()
            os._exit(USER_ERROR_STATUS)

    def _beat(self) -> None:
        self._number += 1
        beat = Beat(self._number, socket.gethostname(), os.getpid(), _line_of(self._main))
        self._store.set(_key(self._rank), json.dumps(asdict(beat)))

    def _read(self, rank: int) -> str:
        """The last beat of a rank as written; empty if there was none."""
        text: str = self._store.get(_key(rank)).decode() if self._store.check([_key(rank)]) else ""
        return text

    def _read_all(self) -> dict[int, Beat]:
        texts = {rank: self._read(rank) for rank in range(self._world_size)}
        return {rank: Beat(**json.loads(text)) for rank, text in texts.items() if text}

    def _failure(self) -> str:
        return self._store.get(FAILURE).decode() if self._store.check([FAILURE]) else ""

    def _report(self, message: str) -> str:
        """Tell all ranks why the run ends; return what was told first."""
        with suppress(RuntimeError):  # the store may have ended with the process that kept it
            told: bytes = self._store.compare_set(FAILURE, "", message)
            return told.decode()
        return message

    def _name_silent(self, seconds: float) -> str:
        """Name the ranks whose hearts do not beat."""
        before = self._read_all()
        time.sleep(2 * self._interval)
        after = self._read_all()
        silent = {rank: beat for rank, beat in after.items() if before.get(rank) == beat and rank != self._rank}
        if not silent:
            return f"a rank did not answer for {seconds:.1f} s and then did"
        return (
            f"{_list(silent)} did not answer for {seconds:.1f} s (parallel.timeout_minutes={self._timeout / 60:g}); "
            f"{REMEDY}"
        )

    def _explain(self, error: RuntimeError) -> str:
        """What a failed collective of this rank is due to."""
        reason = f"({_first_line(error)})"
        time.sleep(min(1.0, 2 * self._interval))  # for the rank that failed to say so
        with suppress(RuntimeError):
            if not self._store_answers():
                return f"rank {self._rank} ends the run: {self._keeper}, which keeps the store, is silent {reason}"
            if failure := self._failure():
                return f"rank {self._rank} ends the run: {failure}"
            if "time" in reason.lower():
                return self._report(self._name_places())
        return f"rank {self._rank} lost another rank, which was killed or ended; see what it said last {reason}"

    def _name_places(self) -> str:
        places = ", ".join(f"rank {rank} at {beat.at}" for rank, beat in self._read_all().items())
        return (
            f"the ranks did not meet within parallel.timeout_minutes={self._timeout / 60:g}; all answer, so look for "
            f"the one that is elsewhere than the others: {places}"
        )


def _key(rank: int) -> str:
    return f"watchdog/{rank}"


def _first_line(error: RuntimeError) -> str:
    """What an error of torch's says, without the place in torch's source before and the advice behind."""
    return str(error).splitlines()[0].split("] ", 1)[-1].split(". This is")[0]


def _list(beats: Mapping[int, Beat]) -> str:
    return ", ".join(f"rank {rank} (process {b.pid} on {b.host}, at {b.at})" for rank, b in beats.items())


def _line_of(thread: int) -> str:
    """The innermost line of this package that a thread is in."""
    for frame, line in traceback.walk_stack(sys._current_frames().get(thread)):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{line}"
    return "the launcher"


def _is_of_communication(error: RuntimeError) -> bool:
    """Whether a collective failed; gloo has no exception class of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
