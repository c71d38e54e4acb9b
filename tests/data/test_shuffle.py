"""The hash and the permutation are checked for bias and for stability."""

from __future__ import annotations

import numpy as np
import pytest

from longnet_dist.data.shuffle import hashed, in_epochs, permuted, samples_of
from longnet_dist.errors import ConfigError


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


def test_micro_batches_of_all_ranks_are_the_samples_of_a_step() -> None:
    places = [(rank, 2, number, 3) for rank in range(2) for number in range(3)]
    for step in (0, 5):
        first = step * 12 + 7
        parts = [samples_of(step, 12, 7, *place) for place in places]
        assert [sample for part in parts for sample in part] == list(range(first, first + 12))
        assert list(samples_of(step, 12, 7)) == list(range(first, first + 12))


def test_micro_batches_must_divide_a_batch() -> None:
    with pytest.raises(ConfigError, match=r"multiple of the 2 data ranks times 3 micro-batches, but 10 is not; use 12"):
        samples_of(0, 10, 0, 0, 2, 0, 3)


def test_every_epoch_has_all_elements_in_an_order_of_its_own() -> None:
    epochs = np.reshape(in_epochs(range(3 * 20), 20, 4), (3, 20)).tolist()
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert in_epochs([25], 20, 4) == [permuted(np.array([5]), 20, 4, 1)[0]]
