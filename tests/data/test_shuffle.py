"""The hash and the permutation."""

from __future__ import annotations

import numpy as np
import pytest

from longnet_dist.data.shuffle import hashed, permuted


def test_values_never_change() -> None:
    """A resumed run must meet the order it left, whatever the version of numpy."""
    assert hashed(1, 2, 3).tolist() == [15020427595393229491]
    assert [permuted(index, 10, 5) for index in range(10)] == [2, 3, 4, 9, 7, 0, 6, 8, 1, 5]


def test_hash_of_an_array_is_the_hash_of_its_elements() -> None:
    together = hashed(7, np.arange(5, 9))
    assert together.tolist() == [int(hashed(7, row)[0]) for row in range(5, 9)]
    assert hashed(1, 2).tolist() != hashed(2, 1).tolist()
    assert hashed(-1).dtype == np.uint64


def test_bits_of_the_hash_are_fair() -> None:
    bits = np.unpackbits(hashed(3, np.arange(20_000)).view(np.uint8)).reshape(20_000, 64).mean(axis=0)
    assert abs(bits - 0.5).max() < 0.02


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000])
def test_every_index_once(size: int) -> None:
    assert sorted(permuted(index, size, 1, 2) for index in range(size)) == list(range(size))


def test_order_is_spread_and_depends_on_every_key() -> None:
    size = 1000
    orders = [[permuted(index, size, *keys) for index in range(size)] for keys in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert abs(np.corrcoef(order, range(size))[0, 1]) < 0.12
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(orders[first], orders[second])[0, 1]) < 0.12


def test_a_huge_range_needs_no_memory() -> None:
    size = 10**15 + 3
    images = {permuted(index, size, 9) for index in range(100)}
    assert len(images) == 100
    assert all(0 <= image < size for image in images)
