"""The short form of ``kill_test.py``."""

import pytest

from tests.faults.kill_test import kill_test


@pytest.mark.slow
@pytest.mark.parametrize("in_checkpoint", [False, True])
def test_a_killed_rank_leaves_no_trace(tmp_path, in_checkpoint):
    assert "equal in every bit" in kill_test(tmp_path, 2 if in_checkpoint else 1, in_checkpoint)
