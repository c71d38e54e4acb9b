"""Random numbers are pure functions of integers here: there is no state to save, and all ranks agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

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


def _feistel(values: Hashes, half_bits: np.uint64, seeds: Hashes) -> Hashes:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    # A round is invertible whatever the hash is, so the network is a permutation.
    for number in range(FEISTEL_ROUNDS):
        left, right = right, left ^ (hashed(seeds, number, right) & mask)
    return left << half_bits | right
