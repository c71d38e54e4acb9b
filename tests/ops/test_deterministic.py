"""Algorithms that repeat in every bit are chosen in their context, by torch, its compiler and cuBLAS."""

import os
from contextlib import suppress

import pytest
import torch
from torch._inductor import config as inductor

from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.ops.deterministic import WORKSPACE, deterministic_algorithms
from longnet_dist.train.loop import run_training
from tests.train.runs import tiny_config


def asked_for():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        inductor.deterministic,
    )


def test_all_is_as_before_behind_it():
    before, environment = asked_for(), {}
    with suppress(KeyError), deterministic_algorithms(environment):
        assert asked_for() == (True, True, False, True)
        raise KeyError
    assert asked_for() == before != (True, True, False, True)
    assert environment == {WORKSPACE: ":4096:8"}


def test_the_workspace_of_the_user_stays():
    environment = {WORKSPACE: ":16:8"}
    with deterministic_algorithms(environment):
        assert environment == {WORKSPACE: ":16:8"}


def test_an_operation_without_such_an_algorithm_warns():
    """On a CPU only ``put_`` with sums and its like have none."""
    x, places = torch.zeros(3), torch.zeros(2, dtype=torch.int64)
    with deterministic_algorithms({}), pytest.warns(UserWarning, match="put_.* does not have a deterministic"):
        x.put_(places, torch.ones(2), accumulate=False)


class SeenError(Exception):
    """Ends a run before it meets others."""


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_asks_for_them(tmp_path, corpus, monkeypatch, deterministic):
    def see(launch):
        raise SeenError(asked_for()[0], WORKSPACE in os.environ)

    monkeypatch.setattr(LaunchEnvironment, "share_cores", see)
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)
    config = tiny_config(tmp_path / "run", corpus, f"train.deterministic={str(deterministic).lower()}")
    with pytest.raises(SeenError) as seen:
        run_training(config, LaunchEnvironment(0, 1, 0, 1))
    assert seen.value.args == (deterministic, deterministic)
    assert not asked_for()[0]
