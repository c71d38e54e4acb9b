import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from longnet_dist.comm.launch_env import LaunchEnvironment, process_group
from longnet_dist.errors import ConfigError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_nothing_set_is_a_run_of_one_process():
    assert LaunchEnvironment.read({}) == LaunchEnvironment(0, 1, 0, 1)


def test_a_leftover_local_rank_is_still_one_process():
    assert LaunchEnvironment.read({"LOCAL_RANK": "3", "MASTER_PORT": "1"}) == LaunchEnvironment()


def test_torchrun():
    assert LaunchEnvironment.read(TORCHRUN) == LaunchEnvironment(5, 8, 1, 4)


@pytest.mark.parametrize("name", [name for name in TORCHRUN if name not in ("RANK", "WORLD_SIZE")])
def test_half_an_environment_is_refused(name):
    with pytest.raises(ConfigError, match=f"but not {name}; start the ranks with torchrun, or unset RANK"):
        LaunchEnvironment.read({key: value for key, value in TORCHRUN.items() if key != name})


def test_ranks_are_numbers():
    with pytest.raises(ConfigError, match="must be numbers"):
        LaunchEnvironment.read(TORCHRUN | {"RANK": "first"})


def test_the_device_is_the_ranks_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert LaunchEnvironment().device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert LaunchEnvironment(5, 8, 1, 4).device() == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ConfigError, match="4 ranks share a machine with 3"):
        LaunchEnvironment(5, 8, 1, 4).device()


def test_cores_are_shared(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    LaunchEnvironment(0, 4, 0, 4).share_cores()
    LaunchEnvironment(0, 2, 0, 2).share_cores()
    LaunchEnvironment(0, 16, 0, 16).share_cores()
    assert chosen == [1, 3, 1]


def test_one_process_needs_no_address(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with process_group(LaunchEnvironment(), torch.device("cpu"), timedelta(seconds=10)):
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()
