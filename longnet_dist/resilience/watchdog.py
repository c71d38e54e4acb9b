"""A watchdog finds the rank that blocks the others, by heartbeats through the rendezvous store."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from pydantic import BaseModel

from longnet_dist.errors import LOST_RANK_STATUS, USER_ERROR_STATUS, LongNetError, LostRankError
from longnet_dist.machine import process_start

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has no SIGKILL; its SIGTERM kills at once
PACKAGE = Path(__file__).parents[1]  # unresolved, as in stack frames: these do not follow symbolic links
MAX_INTERVAL_SECONDS = 5.0
BEATS_IN_TIMEOUT = 40
# A rank is silent after this share of the time-out. The rest is for finding all silent ranks and for the main thread
# to end by itself.
SILENT_SHARE = 0.5
FAILURE = "watchdog/failure"
INFORMED = "watchdog/informed"  # number of ranks that have read the failure
TIMED_OUT = re.compile(r"\btime[ds]?[ -]?out\b", re.IGNORECASE)  # "runtime" and "timestamp" are no time-outs
REMEDY = "look for a process that is stopped or a machine that is lost, and go on with train.resume=auto"


class Beat(BaseModel):
    """A Beat is a heartbeat of one rank.

    Attributes:
        number: number of the beat; a frozen process stops counting.
        host: host of the rank.
        pid: process id of the rank.
        parent: process id of its launcher on the host.
        started: start time of the process in the host's own units; None if unknown. It tells the rank from a later
            process with the same id.
        at: line of this package that the main thread executes.
    """

    number: int
    host: str
    pid: int
    parent: int
    at: str
    started: int | None = None


class Failure(BaseModel):
    """A Failure says why the run ends; the first one that a rank reports is read by all ranks.

    Attributes:
        message: error message.
        status: exit status of the ranks that read it.
        silent: last heartbeats of the ranks that do not answer.
    """

    message: str
    status: int = LOST_RANK_STATUS
    silent: tuple[Beat, ...] = ()


class Watchdog:
    """A Watchdog ends a run in which a rank does not answer, with a message that names the rank.

    In every interval, a thread of each rank writes a heartbeat into the store, reads that of the next rank, and looks
    for a reported failure. These are three small requests for each rank, whatever the number of ranks. A second thread
    watches the first one, whose requests block if the process that keeps the store is frozen.

    A collective of the main thread cannot be interrupted. So a thread ends the process, with status 69 if another rank
    is lost, and 2 if another rank has raised a user error.

    It is a context manager, which every rank must enter and leave.

    Args:
        store: rendezvous store of the run.
        keeper: description of the process that keeps the store, for messages.
        rank: rank of this process.
        world_size: number of ranks.
        timeout_seconds: seconds within which a silent rank ends the run.
        record: called before the run ends because of another rank, to write what helps to find the reason.
    """

    def __init__(
        self,
        store: Any,
        keeper: str,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        record: Callable[[], object] = lambda: None,
    ) -> None:
        self._store = store.clone()  # its own connection, so that requests of the main thread do not delay it
        self._keeper, self._record = keeper, record
        self._rank, self._world_size, self._timeout = rank, world_size, timeout_seconds
        self._interval = min(MAX_INTERVAL_SECONDS, timeout_seconds / BEATS_IN_TIMEOUT)
        self._main = threading.get_ident()
        self._number = 0
        self._known: Failure | None = None  # why the run ends, once it was read
        self._leaving, self._left = threading.Event(), threading.Event()
        self._answered_at = time.monotonic()  # when the store last answered
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._watch_ranks, self._watch_store)]

    def __enter__(self) -> Self:
        self._beat()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Report an error of this rank to the others, or explain one that another rank has caused.

        Raises:
            LostRankError: a collective failed because another rank is lost.
            LongNetError: a collective failed because another rank raised a user error.
        """
        self._leaving.set()
        self._threads[0].join(self._patience)
        try:
            if isinstance(error, RuntimeError) and _is_of_communication(error):
                self._leave_record()
                failure = self._explain(error)
                kind = LostRankError if failure.status == LOST_RANK_STATUS else LongNetError
                raise kind(f"rank {self._rank} {failure.message}") from None
            if error is not None and self._store_answers():
                mistake = isinstance(error, LongNetError | OSError)
                status = USER_ERROR_STATUS if mistake else LOST_RANK_STATUS
                message = f"rank {self._rank} failed: {str(error) or type(error).__name__}"
                self._report(Failure(message=message, status=status))
                self._let_others_read()
        finally:
            self._left.set()

    @property
    def _patience(self) -> float:
        """Return the seconds after which an event that should come in every interval is late."""
        return 3 * self._interval

    def _store_answers(self) -> bool:
        return time.monotonic() - self._answered_at < self._patience

    def _watch_ranks(self) -> None:
        neighbour = (self._rank + 1) % self._world_size
        last, changed_at = "", time.monotonic()
        while not self._leaving.wait(self._interval):
            try:
                self._beat()
                failure, beat = self._failure(), self._read(neighbour)
                # If this process itself was frozen, the time that has passed says nothing about the others.
                if beat != last or not self._store_answers():
                    last, changed_at = beat, time.monotonic()
                self._answered_at = time.monotonic()
                silent_seconds = self._answered_at - changed_at
                if not failure and silent_seconds > SILENT_SHARE * self._timeout:
                    failure = self._name_silent(silent_seconds)
            except RuntimeError as error:
                message = f"{self._keeper}, which keeps the rendezvous store, has ended ({_first_line(error)})"
                failure = Failure(message=message)
            if failure:
                self._end_unless(self._leaving, failure)

    def _watch_store(self) -> None:
        looked_at = time.monotonic()
        while not self._left.wait(self._interval):  # __exit__ sends requests too
            now = time.monotonic()
            if now - looked_at > self._patience:
                self._answered_at = now  # this process itself was frozen
            looked_at = now
            if now - self._answered_at > SILENT_SHARE * self._timeout:
                message = (
                    f"{self._keeper}, which keeps the rendezvous store, {self._did_not_answer(now - self._answered_at)}"
                )
                self._end_unless(self._left, Failure(message=message))

    def _end_unless(self, main_ends: threading.Event, failure: Failure) -> None:
        """End the process, unless the main thread has noticed the failure and ends by itself."""
        if not main_ends.wait(self._patience):
            self._leave_record()
            _kill_siblings(failure.silent)
            # The line break separates the message from a progress bar.
            sys.stderr.write(f"\nerror: rank {self._rank} ends the run: {failure.message}\n")
            sys.stderr.flush()
            os._exit(failure.status)

    def _leave_record(self) -> None:
        """Call ``record``, but wait only for a limited time: the disk may be what hangs."""

        def record() -> None:
            with suppress(OSError, RuntimeError):  # the failure that ends the run matters more
                self._record()

        thread = threading.Thread(target=record, daemon=True)
        thread.start()
        thread.join(self._patience)

    def _beat(self) -> None:
        self._number += 1
        at = _line_of(self._main)
        host, pid, parent = socket.gethostname(), os.getpid(), os.getppid()
        beat = Beat(number=self._number, host=host, pid=pid, parent=parent, at=at, started=process_start(pid))
        self._store.set(_key(self._rank), beat.model_dump_json())

    def _read(self, rank: int) -> str:
        """Return the last heartbeat of a rank as text; empty if there was none."""
        text: str = self._store.get(_key(rank)).decode() if self._store.check([_key(rank)]) else ""
        return text

    def _read_all(self) -> dict[int, Beat]:
        texts = {rank: self._read(rank) for rank in range(self._world_size)}
        return {rank: Beat.model_validate_json(text) for rank, text in texts.items() if text}

    def _failure(self) -> Failure | None:
        if not self._known and self._store.check([FAILURE]):
            self._known = Failure.model_validate_json(self._store.get(FAILURE))
            self._store.add(INFORMED, 1)
        return self._known

    def _report(self, failure: Failure) -> Failure:
        """Report a failure to all ranks; return the one that was reported first, which counts."""
        with suppress(RuntimeError):  # the store may have ended with its process
            self._store.compare_set(FAILURE, "", failure.model_dump_json())
            return self._failure() or failure
        return failure

    def _let_others_read(self) -> None:
        """Wait a little until the others have read the failure, since the store may end with this process."""
        deadline = time.monotonic() + self._patience
        with suppress(RuntimeError):
            while self._store.add(INFORMED, 0) < self._world_size and time.monotonic() < deadline:
                time.sleep(min(0.1, self._interval))

    def _did_not_answer(self, seconds: float) -> str:
        return f"did not answer for {seconds:.1f} s (parallel.timeout_minutes={self._timeout / 60:g}); {REMEDY}"

    def _name_silent(self, seconds: float) -> Failure | None:
        """Report the ranks without new heartbeats; return None if all have one again."""
        before = self._read_all()
        time.sleep(2 * self._interval)
        after = self._read_all()
        silent = {rank: beat for rank, beat in after.items() if before.get(rank) == beat and rank != self._rank}
        if not silent:
            return None
        message = f"{_list(silent)} {self._did_not_answer(seconds)}"
        return self._report(Failure(message=message, silent=tuple(silent.values())))

    def _explain(self, error: RuntimeError) -> Failure:
        """Return why a collective of this rank failed; the message continues after the number of this rank."""
        reason = f"({_first_line(error)})"
        time.sleep(min(1.0, 2 * self._interval))  # gives the rank that failed time to report it
        with suppress(RuntimeError):
            if not self._known and not self._store_answers():
                return Failure(message=f"ends the run: {self._keeper}, which keeps the store, is silent {reason}")
            failure = self._failure()
            if not failure and TIMED_OUT.search(reason):
                failure = self._report(self._name_places())
            if failure:
                return failure.model_copy(update={"message": f"ends the run: {failure.message}"})
        return Failure(message=f"lost another rank, which was killed or ended; see what it said last {reason}")

    def _name_places(self) -> Failure:
        places = ", ".join(f"rank {rank} at {beat.at}" for rank, beat in self._read_all().items())
        message = (
            f"the ranks did not meet within parallel.timeout_minutes={self._timeout / 60:g}; all answer, so look for "
            f"the one that is elsewhere than the others: {places}"
        )
        return Failure(message=message)


def _kill_siblings(silent: tuple[Beat, ...]) -> None:
    """Kill the silent ranks that the launcher of this process has started on this host.

    A frozen process does not react to a request to end. A process with the id of such a rank but another start time is
    not the rank: the rank has ended, and the host has reused the id.
    """
    for beat in silent:
        is_sibling = (beat.host, beat.parent) == (socket.gethostname(), os.getppid())
        if is_sibling and beat.started is not None and beat.started == process_start(beat.pid):
            with suppress(ProcessLookupError):
                os.kill(beat.pid, KILL)


def _key(rank: int) -> str:
    return f"watchdog/{rank}"


def _first_line(error: RuntimeError) -> str:
    """Return the message of a torch error, without the source location before it and the advice after it."""
    return str(error).splitlines()[0].split("] ", 1)[-1].split(". This is")[0]


def _list(beats: Mapping[int, Beat]) -> str:
    return ", ".join(f"rank {rank} (process {b.pid} on {b.host}, at {b.at})" for rank, b in beats.items())


def _line_of(thread: int) -> str:
    """Return the innermost line of this package in the stack of a thread."""
    for frame, line in traceback.walk_stack(sys._current_frames().get(thread)):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{line}"
    return "the launcher"


def _is_of_communication(error: RuntimeError) -> bool:
    """Say whether an error comes from a collective; those of gloo are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
