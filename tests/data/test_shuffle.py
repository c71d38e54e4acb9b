"""The hash and the permutation are checked for bias and for stability."""

from __future__ import annotations

import numpy as np
import pytest

from longnet_dist.data.shuffle import hashed, permuted


def test_values_never_change() -> None:
    """A resumed run must continue in the order of samples that it left, whatever the version of numpy."""
    assert hashed(1, 2, 3).tolist() == [15020427595393229491]
    assert permuted(np.arange(10), 10, 5).tolist() == [6, 2, 4, 5, 1, 8, 9, 7, 3, 0]


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
    assert sorted(permuted(np.arange(size), size, 1, 2).tolist()) == list(range(size))


def test_order_is_spread_and_depends_on_every_key() -> None:
    size = 1000
    orders = [permuted(np.arange(size), size, *keys) for keys in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert abs(np.corrcoef(order, range(size))[0, 1]) < 0.12
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(orders[first], orders[second])[0, 1]) < 0.12


def test_a_huge_range_needs_no_memory() -> None:
    size = 10**15 + 3
    images = permuted(np.arange(100), size, 9)
    assert len(set(images.tolist())) == 100
    assert images.min() >= 0
    assert images.max() < size


def test_every_index_may_have_its_own_keys() -> None:
    together = permuted(np.array([3, 3, 4]), 50, 1, np.array([0, 1, 1]))
    alone = [permuted(np.array([index]), 50, 1, epoch)[0] for index, epoch in ((3, 0), (3, 1), (4, 1))]
    assert together.tolist() == alone
