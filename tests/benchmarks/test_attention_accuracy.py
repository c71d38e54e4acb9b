import random

from benchmarks.attention_accuracy import random_pattern
from longnet_dist.geometry.overlap import computed_share


def test_half_of_the_random_patterns_have_overlaps():
    shares = [
        computed_share(random_pattern(random.Random(seed), 200 + 26 * seed), 200 + 26 * seed, 2, True)
        for seed in range(50)
    ]
    merged = [share for share in shares if share < 1]
    assert 20 <= len(merged) <= 30
    assert min(merged) < 0.7
