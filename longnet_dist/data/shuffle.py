"""Random numbers and the order of samples are pure functions of integers: no state is saved, and all ranks agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from longnet_dist.errors import ConfigError

Hashes = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.integer[Any]]

FEISTEL_ROUNDS = 6


def hashed(*keys: int | Integers) -> Hashes:
    """Hash every combination of the keys to 64 bits.

    The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied once for each key.

    Args:
        keys: integers, or arrays of integers, which broadcast.

    Returns:
        uint64 array of the broadcast shape, with at least one dimension.
    """
    state = np.zeros(1, dtype=np.uint64)  # uint64 arrays overflow silently, as wanted; numpy scalars warn
    for key in keys:
        word = np.atleast_1d(np.asarray(key).astype(np.uint64))
        state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def permuted(indices: Integers, size: int, *keys: int | Integers) -> npt.NDArray[np.int64]:
    """Map ``indices`` by a random permutation of ``[0, size)``, which ``keys`` select.

    A Feistel network permutes ``[0, 4^k)`` for the smallest such power that is at least ``size``. An image outside of
    the range is mapped again until it is inside (cycle walking), which permutes the range itself. Time and memory do
    not grow with ``size``; a shuffled list would need 8 bytes for each element.

    Args:
        indices: (n,) integers in ``[0, size)``.
        size: size of the range, positive.
        keys: integers, or (n,) integers, a key for each index.

    Returns:
        (n,) int64 images.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    images = indices.astype(np.uint64)
    seeds = np.broadcast_to(hashed(*keys), images.shape)
    walking = np.ones(images.shape, dtype=bool)
    while walking.any():
        images[walking] = _feistel(images[walking], np.uint64(half_bits), seeds[walking])
        walking = images >= size
    return images.astype(np.int64)


def samples_of(
    step: int,
    batch_size: int,
    sample_offset: int = 0,
    data_rank: int = 0,
    data_size: int = 1,
    micro_batch: int = 0,
    num_micro_batches: int = 1,
) -> range:
    """Return the numbers of the samples of one micro-batch of a data rank.

    Step ``s`` takes the ``batch_size`` samples from ``s·batch_size + sample_offset`` on, whatever the number of ranks.
    Each data rank takes consecutive ones and cuts them into equal micro-batches.

    Args:
        step: index of the step, from 0.
        batch_size: samples of a step, over all ranks.
        sample_offset: samples seen before a step, minus ``batch_size`` for each earlier step.
        data_rank: coordinate of the rank along the data axis, in ``[0, data_size)``.
        data_size: ranks along the data axis.
        micro_batch: index of the micro-batch, in ``[0, num_micro_batches)``.
        num_micro_batches: micro-batches of a step.

    Raises:
        ConfigError: ``batch_size`` is not a multiple of ``data_size · num_micro_batches``.
    """
    parts = data_size * num_micro_batches
    if batch_size % parts:
        raise ConfigError(
            f"train.batch_size must be a multiple of the {data_size} data ranks times {num_micro_batches} "
            f"micro-batches, but {batch_size} is not; use {-(-batch_size // parts) * parts}"
        )
    size = batch_size // parts
    first = step * batch_size + sample_offset + (data_rank * num_micro_batches + micro_batch) * size
    return range(first, first + size)


def in_epochs(samples: Sequence[int], size: int, seed: int) -> list[int]:
    """Return the element of the data that each sample is; every epoch of ``size`` samples has an order of its own.

    Args:
        samples: numbers of samples, from 0.
        size: elements of the data, positive.
        seed: of the orders.
    """
    epochs, indices = np.divmod(np.asarray(samples, dtype=np.int64), size)
    return list(map(int, permuted(indices, size, seed, epochs)))


def _feistel(values: Hashes, half_bits: np.uint64, seeds: Hashes) -> Hashes:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    # A round is invertible whatever the hash is, so the network is a permutation.
    for number in range(FEISTEL_ROUNDS):
        left, right = right, left ^ (hashed(seeds, number, right) & mask)
    return left << half_bits | right
