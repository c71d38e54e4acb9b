import os
import signal
import socket
import subprocess
import threading
import time

import pytest
import torch.distributed as dist

from longnet_dist.errors import LongNetError, LostRankError
from longnet_dist.machine import process_start
from longnet_dist.resilience import watchdog
from longnet_dist.resilience.watchdog import Beat, Watchdog


@pytest.fixture
def ends(monkeypatch):
    """The statuses with which watchdogs would have ended the process."""
    statuses = []
    monkeypatch.setattr(watchdog.os, "_exit", statuses.append)
    return statuses


def make(store, rank, world_size=2, timeout_seconds=2.0, record=lambda: None):
    return Watchdog(store, "rank 0", rank, world_size, timeout_seconds, record)


def beat_once(store, rank, **place):
    beat = Beat(**{"number": 1, "host": "elsewhere", "pid": 1, "parent": 1, "at": "here"} | place)
    store.set(f"watchdog/{rank}", beat.model_dump_json())


def errors_of(ranks, capfd):
    """The errors that some ranks have written, once each has written one."""
    found, deadline = set(), time.monotonic() + 60
    while not all(any(f"error: rank {rank} " in error for error in found) for rank in ranks):
        assert time.monotonic() < deadline, f"not all of ranks {ranks} have an error: {found}"
        time.sleep(0.05)
        found |= set(filter(None, capfd.readouterr().err.splitlines()))
    return found


def test_ranks_that_answer_are_left_alone(ends):
    store = dist.HashStore()
    with make(store, 0), make(store, 1):
        time.sleep(2.0)  # the time-out
    assert ends == []


def test_a_silent_rank_is_named_to_all(ends, capfd):
    store = dist.HashStore()
    with make(store, 0, 3), make(store, 1, 3):
        beat_once(store, 2)
        errors = errors_of((0, 1), capfd)
    assert set(ends) == {69}
    assert {error.partition(" (process")[0] for error in errors} == {
        f"error: rank {rank} ends the run: rank 2" for rank in (0, 1)
    }
    assert all("parallel.timeout_minutes=0.0333333" in error for error in errors)


def test_a_record_is_left_before_a_silent_rank_ends_the_run(ends, capfd):
    def record():
        left.append(list(ends))
        raise OSError("no space")  # must not keep the run from ending

    store, left = dist.HashStore(), []
    with make(store, 0, record=record):
        beat_once(store, 1)
        errors_of((0,), capfd)
    assert left[0] == []
    assert set(ends) == {69}


def test_a_record_that_hangs_does_not_keep_the_run_from_ending(ends, capfd):
    hangs = threading.Event()
    try:
        with make(dist.HashStore(), 0, record=hangs.wait) as dog:
            beat_once(dog._store, 1)
            errors_of((0,), capfd)
    finally:
        hangs.set()
    assert set(ends) == {69}


def test_the_failure_of_a_rank_reaches_the_others(ends, capfd):
    store = dist.HashStore()
    with make(store, 1):
        with pytest.raises(LongNetError, match="disk is full"), make(store, 0):
            raise LongNetError("disk is full")
        errors = errors_of((1,), capfd)
    assert set(ends) == {2}
    assert errors == {"error: rank 1 ends the run: rank 0 failed: disk is full"}


def test_a_failed_collective_is_explained_by_the_rank_that_failed():
    store = dist.HashStore()
    with pytest.raises(LongNetError, match="disk is full"), make(store, 0):
        raise LongNetError("disk is full")
    with pytest.raises(LongNetError, match="rank 1 ends the run: rank 0 failed: disk is full") as ended, make(store, 1):
        raise RuntimeError("[gloo/pair.cc:1] Connection closed by peer [1.2.3.4]:5. This is typical")
    assert not isinstance(ended.value, LostRankError), "a full disk is no reason to start again"


def test_a_fault_of_ours_on_another_rank_is_a_lost_rank():
    store = dist.HashStore()
    with pytest.raises(ZeroDivisionError), make(store, 0):
        raise ZeroDivisionError
    with pytest.raises(LostRankError, match="rank 1 ends the run: rank 0 failed: ZeroDivisionError"), make(store, 1):
        raise RuntimeError("NCCL error")


def test_a_rank_that_is_silent_and_comes_back_is_left_alone(ends):
    store = dist.HashStore()
    other = make(store, 1)
    other._beat()
    with make(store, 0):
        time.sleep(1.05)  # until rank 0 looks which ones are silent, or nearly so
        for _ in range(20):
            other._beat()
            time.sleep(0.1)
    assert ends == []


def test_a_silent_sibling_is_killed(ends, capfd):
    """A process that the launcher of this one has started, but no other."""
    launcher = os.getppid()
    with subprocess.Popen(["sleep", "60"]) as frozen:
        started = process_start(frozen.pid)
        for parent, status in ((launcher + 1, None), (launcher, -signal.SIGKILL)):
            store = dist.HashStore()
            beat_once(store, 1, host=socket.gethostname(), pid=frozen.pid, parent=parent, started=started)
            with make(store, 0):
                errors_of((0,), capfd)
            if status is None:
                assert frozen.poll() is None
        assert frozen.wait(60) == status


def test_a_stranger_with_the_number_of_a_silent_sibling_is_left_alone(ends, capfd):
    """The sibling has ended, and the host has given its number to a process that started later."""
    with subprocess.Popen(["sleep", "60"]) as stranger:
        for started in (process_start(stranger.pid) - 1, None):
            store = dist.HashStore()
            place = {"host": socket.gethostname(), "pid": stranger.pid, "parent": os.getppid()}
            beat_once(store, 1, **place, started=started)
            with make(store, 0):
                errors_of((0,), capfd)
            assert stranger.poll() is None
        stranger.kill()


def test_a_rank_says_when_it_was_started():
    store = dist.HashStore()
    dog = make(store, 0)
    dog._beat()
    assert dog._read_all()[0].started == process_start(os.getpid()) is not None


def test_a_lost_rank():
    message = r"lost another rank.*\(Connection closed by peer \[1\.2\.3\.4\]:5\)"
    with pytest.raises(LostRankError, match=message), make(dist.HashStore(), 1):
        raise RuntimeError("[gloo/pair.cc:1] Connection closed by peer [1.2.3.4]:5. This is typical")


def test_ranks_that_answer_but_do_not_meet_are_placed():
    store = dist.HashStore()
    make(store, 0)._beat()
    with pytest.raises(LostRankError, match=r"did not meet within .*: rank 0 at .*, rank 1 at "), make(store, 1):
        raise RuntimeError("[gloo/context.cc:1] Timed out waiting 2000ms for recv")


def test_a_runtime_error_is_no_time_out():
    """The word "runtime" names no time-out, so the places of the ranks explain nothing."""
    make(store := dist.HashStore(), 0)._beat()
    with pytest.raises(LostRankError, match="lost another rank"), make(store, 1):
        raise RuntimeError("NCCL error: the CUDA runtime reports an unhandled error")


@pytest.mark.parametrize("words", ["Timed out waiting 2000ms", "collective operation timeout", "a time-out came"])
def test_time_outs_are_known_by_their_words(words):
    make(store := dist.HashStore(), 0)._beat()
    with pytest.raises(LostRankError, match="did not meet"), make(store, 1):
        raise RuntimeError(f"NCCL {words}")


def test_an_error_of_ours_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shapes"), make(dist.HashStore(), 0):
        raise RuntimeError("shapes differ")
