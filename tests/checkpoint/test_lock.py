import multiprocessing
import os
import signal
import time

import pytest

from longnet_dist.checkpoint import lock as locks
from longnet_dist.checkpoint.lock import Lock, Owner, read_owner
from longnet_dist.errors import ConfigError

WHAT = "train.output_dir=runs/x"


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    return tmp_path / "run" / "run.lock"


def hold(path):
    with Lock(path, WHAT):
        time.sleep(60)


def started_holder(path):
    """A process that has the lock."""
    process = multiprocessing.get_context("fork").Process(target=hold, args=(path,))
    process.start()
    while read_owner(path) is None:
        time.sleep(0.01)
    return process


def test_a_lock_is_there_while_it_is_held(path):
    with Lock(path, WHAT) as lock:
        owner = read_owner(path)
        assert owner == lock.owner
        assert owner.pid == os.getpid()
    assert not path.parent.exists()
    path.parent.mkdir()
    with Lock(path, WHAT):
        pass
    assert list(path.parent.iterdir()) == []
    path.parent.rmdir()
    with Lock(path, WHAT):
        (path.parent / "config.yaml").write_text("")
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]


def test_a_second_process_is_refused_and_changes_nothing(path):
    with Lock(path, WHAT), pytest.raises(ConfigError, match=rf"{WHAT} is in use by process {os.getpid()} on host "):
        Lock(path, WHAT).__enter__()
    assert not path.exists()
    process = started_holder(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=f"is in use by process {process.pid} on host"):
        Lock(path, WHAT).__enter__()
    assert path.read_bytes() == before
    process.kill()
    process.join()


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_process_is_taken_over(path, capsys, reaped):
    process = started_holder(path)
    os.kill(process.pid, signal.SIGKILL)
    if reaped:
        process.join()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie has ended too
    with Lock(path, WHAT) as lock:
        assert read_owner(path) == lock.owner
    assert f"took over the lock of {WHAT}: process {process.pid} on host" in capsys.readouterr().err
    assert list(path.parent.iterdir()) == []
    process.join()


def write(path, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Owner.of_this_process().model_copy(update=changes).model_dump_json())


@pytest.mark.parametrize("changes", [{"started": 1}, {"host": "elsewhere"}, {"namespace": "pid:[1]"}])
def test_a_lock_without_a_living_owner_is_stale(path, capsys, changes):
    """Of a later process with the same id, and of other machines and containers that touch their file no more."""
    write(path, **changes)
    with Lock(path, WHAT):
        pass
    assert "took over the lock" in capsys.readouterr().err


def test_a_damaged_lock_is_stale(path, capsys):
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with Lock(path, WHAT):
        pass
    assert "another process has ended without releasing it" in capsys.readouterr().err


def test_a_lock_of_another_machine_that_is_touched_is_in_use(path, monkeypatch):
    with Lock(path, WHAT):
        monkeypatch.setattr(locks.socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(ConfigError, match="is in use by process"):
            Lock(path, WHAT).__enter__()
        assert path.exists()


def test_a_lock_of_another_is_not_released(path):
    with Lock(path, WHAT):
        write(path, nonce="of another")
    assert read_owner(path).nonce == "of another"


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"train\.output_dir=runs/x cannot be locked"):
        Lock(tmp_path / "file" / "run.lock", WHAT).__enter__()
