import threading

import pytest
import torch

from longnet_dist.errors import DataError
from longnet_dist.train.batch_prefetch import RowsAhead

CPU = torch.device("cpu")


def rows_of(step):
    return [(torch.tensor([[step]]), torch.tensor([[step + 1]]))]


def tokens(readers):
    return [int(read((0, 1))[0]) for read in readers]


def test_the_next_step_is_read_while_nobody_waits():
    read, second = [], threading.Event()

    def note(step):
        read.append(step)
        if step == 1:
            second.set()
        return rows_of(step)

    ahead = RowsAhead(note, 2, CPU)
    assert tokens(ahead.of(0)) == [0]
    assert second.wait(10)
    assert tokens(ahead.of(1)) == [1]
    assert tokens(ahead.of(7)) == [7]  # as after a checkpoint was restored
    assert read == [0, 1, 7]


def test_an_error_is_that_of_the_step_which_needs_the_rows():
    def fail_later(step):
        if step:
            raise DataError("damaged")
        return rows_of(step)

    ahead = RowsAhead(fail_later, 2, CPU)
    ahead.of(0)
    with pytest.raises(DataError, match="damaged"):
        ahead.of(1)
