"""Which rank holds the others up: heartbeats through the rendezvous store."""

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

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has SIGTERM alone, which kills there
PACKAGE = Path(__file__).parents[1]  # as in the frames of its code: a link is not followed there
MAX_INTERVAL_SECONDS = 5.0
BEATS_IN_TIMEOUT = 40
# Of the time-out; the rest is for finding all silent ranks, for the main thread to end itself, and spare.
SILENT_SHARE = 0.5
FAILURE = "watchdog/failure"
INFORMED = "watchdog/informed"  # number of ranks that know of the failure
TIMED_OUT = re.compile(r"\btime[ds]?[ -]?out\b", re.IGNORECASE)  # "runtime" and "timestamp" are no time-outs
REMEDY = "look for a process that is stopped or a machine that is lost, and go on with train.resume=auto"


class Beat(BaseModel):
    """What a rank says of itself every so often.

    Attributes:
        number: of the beat; a frozen process stops counting.
        host, pid, parent: where the rank runs, and the process that launched it there.
        started: when the process was started, in the host's own units; None where the host does not tell. The host may
            give the number of a process that has ended to another one, which started later.
        at: the line of this package that its main thread is in.
    """

    number: int
    host: str
    pid: int
    parent: int
    at: str
    started: int | None = None


class Failure(BaseModel):
    """Why the run ends; the first that is reported is told to all ranks.

    Attributes:
        message: of the error.
        status: the exit status of the ranks that are told.
        silent: ranks that do not answer.
    """

    message: str
    status: int = LOST_RANK_STATUS
    silent: tuple[Beat, ...] = ()


class Watchdog:
    """Ends a run in which a rank does not answer, with the number of that rank.

    A thread of every rank writes a heartbeat into the store, reads that of the next rank, and looks whether a failure
    has been reported: three small requests a rank and interval, however many ranks there are. A second thread watches
    the first, whose requests wait for ever if the store's keeper is frozen. Every rank must enter and leave. A
    collective of the main thread cannot be interrupted, so a thread ends the process, with status 69 where another rank
    is lost and 2 where it made a mistake.

    Args:
        store: the rendezvous store of the run.
        keeper: the process that keeps the store, in words.
        rank: of this process.
        world_size: number of ranks.
        timeout_seconds: within which a silent rank ends the run.
        record: called before the run ends because of another rank, to leave what helps to find out why.
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
        self._store = store.clone()  # a connection of its own, so that requests of the main thread do not delay it
        self._keeper, self._record = keeper, record
        self._rank, self._world_size, self._timeout = rank, world_size, timeout_seconds
        self._interval = min(MAX_INTERVAL_SECONDS, timeout_seconds / BEATS_IN_TIMEOUT)
        self._main = threading.get_ident()
        self._number = 0
        self._told: Failure | None = None  # why the run ends
        self._leaving, self._left = threading.Event(), threading.Event()
        self._answered_at = time.monotonic()  # when the store last did
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._watch_ranks, self._watch_store)]

    def __enter__(self) -> Self:
        self._beat()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Report an error of this rank to the others; replace one that another rank caused by its explanation."""
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
        """Seconds after which what happens in every interval is late."""
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
                # If this process itself was stopped, its clock says nothing of the others.
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
        while not self._left.wait(self._interval):  # leaving takes requests, too
            now = time.monotonic()
            if now - looked_at > self._patience:
                self._answered_at = now  # this process itself was stopped
            looked_at = now
            if now - self._answered_at > SILENT_SHARE * self._timeout:
                message = (
                    f"{self._keeper}, which keeps the rendezvous store, {self._did_not_answer(now - self._answered_at)}"
                )
                self._end_unless(self._left, Failure(message=message))

    def _end_unless(self, main_does: threading.Event, failure: Failure) -> None:
        """End the process, unless the main thread can end it with a message of its own, having seen the same."""
        if not main_does.wait(self._patience):
            self._leave_record()
            _kill_siblings(failure.silent)
            # On a line of its own, below the progress bar.
            sys.stderr.write(f"\nerror: rank {self._rank} ends the run: {failure.message}\n")
            sys.stderr.flush()
            os._exit(failure.status)

    def _leave_record(self) -> None:
        """Leave it if that can be done in time: the disk itself may be what hangs."""

        def record() -> None:
            with suppress(OSError, RuntimeError):  # what ends the run matters more
                self._record()

        thread = threading.Thread(target=record, daemon=True)
        thread.start()
        thread.join(self._patience)

    def _beat(self) -> None:
        self._number += 1
        at = _line_of(self._main)
        host, pid, parent = socket.gethostname(), os.getpid(), os.getppid()
        beat = Beat(number=self._number, host=host, pid=pid, parent=parent, at=at, started=_start_time(pid))
        self._store.set(_key(self._rank), beat.model_dump_json())

    def _read(self, rank: int) -> str:
        """The last beat of a rank as written; empty if there was none."""
        text: str = self._store.get(_key(rank)).decode() if self._store.check([_key(rank)]) else ""
        return text

    def _read_all(self) -> dict[int, Beat]:
        texts = {rank: self._read(rank) for rank in range(self._world_size)}
        return {rank: Beat.model_validate_json(text) for rank, text in texts.items() if text}

    def _failure(self) -> Failure | None:
        if not self._told and self._store.check([FAILURE]):
            self._told = Failure.model_validate_json(self._store.get(FAILURE))
            self._store.add(INFORMED, 1)
        return self._told

    def _report(self, failure: Failure) -> Failure:
        """Tell all ranks why the run ends; return what was told first."""
        with suppress(RuntimeError):  # the store may have ended with the process that kept it
            self._store.compare_set(FAILURE, "", failure.model_dump_json())
            return self._failure() or failure
        return failure

    def _let_others_read(self) -> None:
        """Wait a little for the others to know, since the store may end with this process."""
        deadline = time.monotonic() + self._patience
        with suppress(RuntimeError):
            while self._store.add(INFORMED, 0) < self._world_size and time.monotonic() < deadline:
                time.sleep(min(0.1, self._interval))

    def _did_not_answer(self, seconds: float) -> str:
        return f"did not answer for {seconds:.1f} s (parallel.timeout_minutes={self._timeout / 60:g}); {REMEDY}"

    def _name_silent(self, seconds: float) -> Failure | None:
        """Report the ranks whose hearts do not beat; None if all do again."""
        before = self._read_all()
        time.sleep(2 * self._interval)
        after = self._read_all()
        silent = {rank: beat for rank, beat in after.items() if before.get(rank) == beat and rank != self._rank}
        if not silent:
            return None
        message = f"{_list(silent)} {self._did_not_answer(seconds)}"
        return self._report(Failure(message=message, silent=tuple(silent.values())))

    def _explain(self, error: RuntimeError) -> Failure:
        """What a failed collective of this rank is due to, with a message that goes on after the name of this rank."""
        reason = f"({_first_line(error)})"
        time.sleep(min(1.0, 2 * self._interval))  # for the rank that failed to say so
        with suppress(RuntimeError):
            if not self._told and not self._store_answers():
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
    """Kill the silent ranks that the launcher of this process started on this host.

    A frozen process does not react when it is asked to end. A process that has the number of such a rank but another
    start time is a stranger: the rank has ended and the host has given its number away.
    """
    for beat in silent:
        is_sibling = (beat.host, beat.parent) == (socket.gethostname(), os.getppid())
        if is_sibling and beat.started is not None and beat.started == _start_time(beat.pid):
            with suppress(ProcessLookupError):
                os.kill(beat.pid, KILL)


def _start_time(pid: int) -> int | None:
    """When a process of this host was started, in clock ticks since boot; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in parentheses may hold spaces; the start time is field 22 of proc(5), the 20th behind the name.
    return int(stat.rpartition(")")[2].split()[19])


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
