"""Randomness as a pure function of integers, so that no state has to be saved and every rank agrees."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.integer[Any]]

FEISTEL_ROUNDS = 6


def hashed(*keys: int | Integers) -> Hashes:
    """64 well mixed bits for every combination of the keys, which broadcast; at least one-dimensional uint64.

    The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied once a key.
    """
    state = np.zeros(1, dtype=np.uint64)  # arrays wrap around without a warning, numpy scalars do not
    for key in keys:
        word = np.atleast_1d(np.asarray(key).astype(np.uint64))
        state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def permuted(indices: Integers, size: int, *keys: int | Integers) -> npt.NDArray[np.int64]:
    """The images of ``indices`` under a random permutation of ``[0, size)`` that ``keys`` name.

    A Feistel network permutes the next power of four above ``size``; walking along its cycle until the image lies below
    ``size`` permutes the range itself. Constant time and memory, where a shuffled list would take 8 bytes an element.

    Args:
        indices: (n,) integers in ``[0, size)``.
        size: positive.
        keys: integers, or (n,) integers where every index has its own.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    images = indices.astype(np.uint64)
    names = np.broadcast_to(hashed(*keys), images.shape)
    walking = np.ones(images.shape, dtype=bool)
    while walking.any():
        images[walking] = _feistel(images[walking], np.uint64(half_bits), names[walking])
        walking = images >= size
    return images.astype(np.int64)


def _feistel(values: Hashes, half_bits: np.uint64, names: Hashes) -> Hashes:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for turn in range(FEISTEL_ROUNDS):
        left, right = right, left ^ (hashed(names, turn, right) & mask)
    return left << half_bits | right
