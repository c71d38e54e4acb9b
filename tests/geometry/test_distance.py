"""Distances in blocks equal a search over all pairs, and the grids of long patterns are counted at once."""

import random

import numpy as np
import pytest

from longnet_dist import DilatedPattern
from longnet_dist.errors import ConfigError
from longnet_dist.geometry.distance import block_distances


def sight(pattern, rows, heads, causal):
    """Return (N, N): whether row n sees row m in one block, by the definition of the pattern."""
    sees = np.eye(rows, dtype=bool)
    for branch in pattern:
        shift = branch.shift
        number = np.array([(row - shift) // branch.segment_length for row in range(rows)])
        start = np.maximum(0, number * branch.segment_length + shift)
        for offset in pattern.offsets(branch, heads):
            kept = (np.arange(rows) - start) % branch.dilation_rate == offset
            sees |= (number[:, None] == number) & kept[:, None] & kept
    return np.tril(sees) if causal else sees


def search(patterns, rows, heads, causal):
    """Return the number of blocks of every pair, -1 where none connects it, by a search over all pairs."""
    blocks = [sight(pattern, rows, heads, causal) for pattern in patterns]
    found, reached, unchanged, depth = np.where(np.eye(rows, dtype=bool), 0, -1), np.eye(rows, dtype=bool), 0, 0
    while unchanged < len(blocks):
        later = blocks[depth % len(blocks)].astype(np.float32) @ reached.astype(np.float32) > 0
        depth += 1
        unchanged = 0 if (later & ~reached).any() else unchanged + 1
        found[later & ~reached] = depth
        reached = later
    return found


def compare(patterns, rows, heads, causal):
    distances, expected = block_distances(patterns, rows, heads, causal), search(patterns, rows, heads, causal)
    wanted = np.tril(np.ones((rows, rows), bool), -1) if causal else ~np.eye(rows, dtype=bool)
    needed = expected[wanted]
    assert distances.pairs == needed.size
    assert distances.never == (needed < 0).sum()
    connected = needed[needed >= 0]
    if connected.size == 0:
        assert (distances.worst, distances.mean, distances.last_pair) == (0, 0.0, None)
        return
    assert distances.worst == connected.max()
    assert distances.mean == pytest.approx(connected.mean())
    assert expected[distances.last_pair] == connected.max()
    assert distances.within == tuple((connected <= depth).sum() for depth in range(connected.max() + 1))
    for top, left, height, width in distances.unconnected:
        assert (expected[top : top + height, left : left + width] == -1).all()
    assert bool(distances.unconnected) == (distances.never > 0)
    assert ("never see" in distances.named()) == (distances.never > 0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_counts_equal_a_search_over_all_pairs(seed, causal):
    rng = random.Random(seed)
    patterns = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        branches = rng.randint(1, 3)
        lengths = [rng.choice((4, 8, 12, 16, 20, 37, 64, 96, 256)) for _ in range(branches)]
        rates = [rng.choice((1, 2, 3, 4, 6, 8, 16)) for _ in range(branches)]
        shift = [rng.randrange(length) for length in lengths] if rng.random() < 0.5 else None
        patterns.append(DilatedPattern(lengths, rates, rng.choice(("modulo", "blocked")), shift))
    compare(patterns, rng.randint(1, 300), rng.choice((1, 2, 3, 5)), causal)


@pytest.mark.parametrize("causal", [True, False])
def test_geometric_patterns_and_ragged_lengths(causal):
    for rows in (1, 2, 31, 64, 97, 512, 700):
        compare([DilatedPattern.geometric(32, rows)], rows, 3, causal)
    compare([DilatedPattern.geometric(16, 600, 3)], 600, 4, causal)


@pytest.mark.parametrize("causal", [True, False])
def test_layers_with_other_offsets_and_grids(causal):
    pattern = DilatedPattern([16, 32, 64], [1, 2, 6])
    for offsets, shift in ((True, False), (False, True), (True, True)):
        compare([pattern.of_layer(layer, offsets, shift) for layer in range(6)], 300, 2, causal)


def test_the_papers_pattern_never_crosses_its_longest_segment():
    distances = block_distances(DilatedPattern.paper(), 2**30, 12)
    of_one = block_distances(DilatedPattern.paper(), 2**15, 12)
    assert distances.connected == of_one.connected * 2**15
    assert (distances.worst, distances.mean) == (of_one.worst, of_one.mean)
    top, left, height, width = distances.unconnected[0]
    assert (top, left, height, width) == (2**29, 0, 2**29, 2**29)
    assert distances.named().startswith("rows 536,870,912–1,073,741,823 never see 0–536,870,911")


def test_a_geometric_pattern_connects_a_billion_rows_in_few_blocks():
    distances = block_distances(DilatedPattern.geometric(2048, 2**30), 2**30, 12, causal=False)
    assert (distances.never, distances.worst) == (0, 5)
    causal = block_distances(DilatedPattern.geometric(2048, 2**20), 2**20, 12)
    assert causal.worst == 4
    assert 0 < causal.never < 0.01 * causal.pairs


def test_the_limit_bounds_the_count_and_not_what_is_connected():
    pattern = [DilatedPattern([8], [1]), DilatedPattern([12], [1])]
    whole, cut = block_distances(pattern, 480, 1), block_distances(pattern, 480, 1, limit=2)
    assert whole.worst > 2
    assert (cut.worst, cut.mean) == (None, None)
    assert cut.within == whole.within[:3]
    assert cut.connected == whole.connected
    expected = search(pattern, 480, 1, True)
    assert expected[cut.last_pair] == 2


def test_bad_arguments_are_refused():
    pattern = DilatedPattern([8], [1])
    for arguments in (([], 8, 1), (pattern, 0, 1), (pattern, 8, 0)):
        with pytest.raises(ConfigError, match="at least one of each"):
            block_distances(*arguments)


def test_grids_that_do_not_repeat_are_refused(monkeypatch):
    monkeypatch.setattr("longnet_dist.geometry.block_matrix.MAX_PRODUCTS", 50)
    with pytest.raises(ConfigError, match="repeat too rarely"):
        block_distances(DilatedPattern([61, 67], [1, 7]), 5000, 2)
