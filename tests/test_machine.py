import os
import subprocess
import sys

import pytest

from longnet_dist import machine
from longnet_dist.errors import ConfigError


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
    monkeypatch.setattr(machine, "CGROUP_LIMIT", tmp_path / "memory.max")
    whole = machine.host_memory_bytes()
    assert whole > 2**28
    machine.CGROUP_LIMIT.write_text("max\n")
    assert machine.host_memory_bytes() == whole
    machine.CGROUP_LIMIT.write_text("268435456\n")
    assert machine.host_memory_bytes() == 2**28


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
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_resident_bytes() is None
