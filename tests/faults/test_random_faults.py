"""Faults of several kinds leave no trace: the short form of ``random_faults.py``."""

import pytest

from tests.faults.random_faults import KINDS, random_faults, under_torchrun


@pytest.mark.parametrize("parts", [True, False], ids=["parts", "whole"])
def test_faults_of_several_kinds_leave_the_weights_of_the_undisturbed_run(tmp_path, parts):
    kinds = ("kill", "lost folder", "pause") if parts else ("full disk", "kill", "lost folder")
    seen = random_faults(tmp_path, 3, seed=0, parts=parts, kinds=kinds)
    assert sum(seen["by_kind"].values()) == 3
    assert seen["end"] == "step_00000048"


@pytest.mark.long
@pytest.mark.parametrize("parts", [True, False], ids=["parts", "whole"])
def test_many_faults(tmp_path, parts):
    seen = random_faults(tmp_path, 40, seed=int(parts), parts=parts)
    assert seen["by_kind"].keys() <= set(KINDS)


@pytest.mark.long
def test_many_faults_under_torchrun(tmp_path):
    assert under_torchrun(tmp_path, 20, seed=0)["faults"] == 20
