import threading

import pytest

from longnet_dist.errors import DataError
from longnet_dist.train.batch_prefetch import StepsAhead


def test_the_next_step_is_prepared_while_nobody_waits():
    prepared, second = [], threading.Event()

    def note(step):
        prepared.append(step)
        if step == 1:
            second.set()
        return 10 * step

    ahead = StepsAhead(note, 2)
    assert ahead.of(0) == 0
    assert second.wait(10)
    assert ahead.of(1) == 10
    assert ahead.of(7) == 70  # as after a checkpoint was restored
    assert prepared == [0, 1, 7]


def test_an_error_is_that_of_the_step_which_needs_the_rows():
    def fail_later(step):
        if step:
            raise DataError("damaged")
        return step

    ahead = StepsAhead(fail_later, 2)
    ahead.of(0)
    with pytest.raises(DataError, match="damaged"):
        ahead.of(1)
