"""Masks of the baselines: their definitions, and what kernels are told of them."""

import math
import random

import numpy as np
import pytest

from longnet_dist.errors import ConfigError
from longnet_dist.geometry.masked_pattern import NONE, PART, WHOLE, FixedPattern, WindowPattern
from longnet_dist.geometry.overlap import computed_share


def fixed(N, head):
    """Return (N, N): the fixed pattern row by row, from its words."""
    length = max(128, 128 * round(math.sqrt(N) / 128))
    first_of_columns = length - 32 * (head % (length // 32) + 1)
    sees = np.zeros((N, N), bool)
    for n in range(N):
        begin = n - n % length
        sees[n, begin : n + 1] = True
        for block in range(0, begin, length):
            sees[n, block + first_of_columns : block + first_of_columns + 32] = True
    return sees


def windowed(N, window, causal):
    sees = np.zeros((N, N), bool)
    for n in range(N):
        sees[n, max(0, n - window + 1) : n + 1 if causal else n + window] = True
    return sees


def check(pattern, masks, N, causal):
    """Compare all that a pattern says with the masks (heads, N, N)."""
    heads, rows = len(masks), np.arange(N)
    for head, mask in enumerate(masks):
        assert (pattern.sees(rows[:, None], rows, head, N, causal) == mask).all()
    assert pattern.pairs(N, heads, causal) == sum(int(mask.sum()) for mask in masks)
    assert pattern.flops(N, 2 * heads, 8, causal, heads) == 4 * 8 * 2 * pattern.pairs(N, heads, causal)
    assert computed_share(pattern, N, heads, causal) == 1
    found = np.zeros_like(masks)
    for start, stop, keys, mask in pattern.tiles(N, heads, causal):
        for head in range(heads):
            assert len(set(keys[head].tolist())) == keys.shape[1]
            found[head, start:stop, keys[head]] = mask.T
    assert (found == masks).all()
    blocks = pattern.blocks(N, heads, 32, causal)
    for head, n, m in np.ndindex(blocks.shape):
        part = masks[head, 32 * n : 32 * n + 32, 32 * m : 32 * m + 32]
        if not part.any():
            assert blocks[head, n, m] == NONE
        elif part.all():
            assert blocks[head, n, m] in (PART, WHOLE)
        else:
            assert blocks[head, n, m] == PART


@pytest.mark.parametrize("N", [1, 127, 128, 129, 500, 777])
def test_the_fixed_pattern_is_its_words(N):
    check(FixedPattern(), np.stack([fixed(N, head) for head in range(6)]), N, True)


def test_blocks_grow_with_the_root_of_the_length():
    assert [FixedPattern.stride(N) for N in (1, 2048, 8192, 32768, 131072, 2**20)] == [128, 128, 128, 128, 384, 1024]
    N = 40000
    assert FixedPattern.stride(N) == 256
    rows = np.array([39999, 256, 255, 512])
    mask = FixedPattern().sees(rows[:, None], np.arange(N), 9, N, True)
    columns = 256 - 32 * 2
    expected = [39999 % 256 + 1 + 39999 // 256 * 32, 1 + 32, 256, 1 + 64]
    assert mask.sum(1).tolist() == expected
    assert mask[1, columns : columns + 32].all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_a_window_is_its_words(seed, causal):
    rng = random.Random(seed)
    N, window = rng.randint(1, 400), rng.choice((1, 2, 31, 64, 100, 300, 1000))
    check(WindowPattern(window), np.stack([windowed(N, window, causal)] * 2), N, causal)


def test_flops_count_documents_and_a_window_needs_a_row():
    pattern = WindowPattern(10)
    parts = sum(pattern.flops(rows, 2, 4, True) for rows in (30, 5, 30))
    assert pattern.flops(65, 2, 4, True, cu_seqlens=[0, 30, 35, 65]) == parts
    assert (repr(pattern), repr(FixedPattern())) == ("WindowPattern(10)", "FixedPattern()")
    assert pattern != WindowPattern(11)
    assert len({pattern, WindowPattern(10), FixedPattern()}) == 2
    with pytest.raises(ConfigError, match="at least one row"):
        WindowPattern(0)
