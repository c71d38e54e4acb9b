import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from longnet_dist import machine
from longnet_dist.errors import ConfigError


def groups(monkeypatch, folder, membership, files):
    """Let a process be in these control groups, whose files have these contents."""
    shutil.rmtree(folder / "groups", ignore_errors=True)
    for name, content in files.items():
        (folder / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "groups" / name).write_text(content + "\n")
    (folder / "membership").write_text(membership)
    monkeypatch.setattr(machine, "CGROUPS", folder / "groups")
    monkeypatch.setattr(machine, "MEMBERSHIP", folder / "membership")


@pytest.fixture(autouse=True)
def no_groups(monkeypatch, tmp_path):
    groups(monkeypatch, tmp_path, "", {})


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 5, 7}, raising=False)
    assert machine.usable_cores() == 3


def test_cores_are_all_where_the_system_does_not_say(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert machine.usable_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.usable_cores() == 1


def test_memory_is_what_the_control_group_leaves(monkeypatch, tmp_path):
    groups(monkeypatch, tmp_path, "", {})
    whole = machine.host_memory_bytes()
    assert whole > 2**28
    for membership, files, expected in [
        ("0::/\n", {"memory.max": "max"}, whole),
        ("0::/\n", {"memory.max": "268435456"}, 2**28),
        ("", {"memory.max": "268435456"}, 2**28),
        ("0::/job/step\n", {"job/step/memory.max": "max", "job/memory.max": "268435456"}, 2**28),
        ("4:memory:/job\n", {"memory/job/memory.limit_in_bytes": "268435456"}, 2**28),
        ("4:memory:/docker/abc\n", {"memory/memory.limit_in_bytes": "268435456"}, 2**28),
        ("4:memory:/job\n", {"memory/job/memory.limit_in_bytes": "9223372036854771712"}, whole),
        ("4:cpuset:/job\n", {"memory/job/memory.limit_in_bytes": "268435456"}, whole),
    ]:
        groups(monkeypatch, tmp_path, membership, files)
        assert machine.host_memory_bytes() == expected, (membership, files)


def test_cores_are_what_the_quota_leaves(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    quota, period = "cpu.cfs_quota_us", "cpu.cfs_period_us"
    for membership, files, expected in [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000"}, 2),
        ("0::/\n", {"cpu.max": "20000 100000"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000"}, 8),
        ("0::/job/step\n", {"job/step/cpu.max": "400000 100000", "job/cpu.max": "300000 100000"}, 3),
        ("2:cpu,cpuacct:/job\n", {f"cpu,cpuacct/job/{quota}": "200000", f"cpu,cpuacct/job/{period}": "100000"}, 2),
        ("2:cpu,cpuacct:/job\n", {f"cpu/{quota}": "-1", f"cpu/{period}": "100000"}, 8),
        ("1:cpu:/docker/abc\n0::/\n", {f"cpu/{quota}": "500000", f"cpu/{period}": "100000"}, 5),
    ]:
        groups(monkeypatch, tmp_path, membership, files)
        assert machine.usable_cores() == expected, (membership, files)


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, None),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x"}, 2),
        ({"OMP_NUM_THREADS": "many"}, None),
        ({"OMP_NUM_THREADS": "0"}, None),
        ({"OMP_NUM_THREADS": "99999999999"}, None),
        ({"OMP_NUM_THREADS": "1" * 5000}, None),
        ({"OMP_NUM_THREADS": "000000000"}, None),
    ],
)
def test_the_threads_that_the_user_asks_for_are_heeded(environment, threads):
    assert machine.user_threads(environment) == threads


def test_unknown_memory_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    with pytest.raises(ConfigError, match="plan for a GPU by its name"):
        machine.host_memory_bytes()


def test_resident_memory_counts_what_was_used():
    code = (
        "from longnet_dist.machine import peak_resident_bytes; before = peak_resident_bytes()\n"
        "block = b'x' * (before + 2**25); print(peak_resident_bytes() - before)"
    )
    grown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(grown) > 2**24


def test_resident_memory_is_unknown_where_the_system_does_not_say(monkeypatch):
    monkeypatch.setattr(machine, "STATUS", Path("nowhere"))
    assert machine.peak_resident_bytes() > 2**20
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_resident_bytes() is None


@pytest.mark.skipif(not machine.STATUS.exists(), reason="asks Linux")
def test_the_peak_of_a_process_is_not_that_of_its_parent():
    held = np.ones(300 << 17)  # 300 MiB
    code = "from longnet_dist.machine import peak_resident_bytes; print(peak_resident_bytes())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert 2**20 < int(done.stdout) < held.nbytes < machine.peak_resident_bytes()
