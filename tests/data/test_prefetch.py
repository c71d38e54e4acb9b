import threading

import pytest

from longnet_dist.data.prefetch import read_ahead


def test_items_come_in_order_with_what_was_read():
    assert list(read_ahead(lambda x: x * x, range(5))) == [(0, 0), (1, 1), (2, 4), (3, 9), (4, 16)]
    assert list(read_ahead(lambda x: x, [])) == []


def test_the_next_item_is_read_while_the_caller_works():
    read = [threading.Event() for _ in range(3)]
    for item, _ in read_ahead(lambda item: read[item].set(), range(3)):
        if item < 2:
            assert read[item + 1].wait(10)


def test_no_more_than_one_item_is_read_ahead():
    read = []
    ahead = read_ahead(read.append, range(10))
    next(ahead)
    assert len(read) <= 2


def test_a_fault_while_reading_is_raised():
    def fail(item):
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 3"):
        next(read_ahead(fail, [3]))
