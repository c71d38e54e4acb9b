"""The lengths of the warm-up double, each for as many steps, and end at the whole sample."""

import pytest

from longnet_dist.optim.sequence_lengths import growth, length_of, lengths_of


@pytest.mark.parametrize(
    ("shortest", "longest", "lengths"),
    [(2048, 16384, [2048, 4096, 8192]), (1500, 8192, [2048, 4096]), (10, 45, [12, 23]), (5, 8, []), (1, 1, [])],
)
def test_lengths_are_halves_of_the_longest(shortest, longest, lengths):
    assert lengths_of(shortest, longest) == lengths


def test_each_length_has_as_many_steps():
    found = [length_of(step, 10, 16, 64) for step in range(12)]
    assert found == [16] * 5 + [32] * 5 + [64] * 2
    assert [length_of(step, 5, 8, 64) for step in range(7)] == [8, 8, 16, 16, 32, 64, 64]
    assert length_of(0, 0, 16, 64) == 64


def test_growth_names_the_first_step_of_each_length():
    assert growth(10, 1024, 4096) == "1,024 tokens from step 1, 2,048 tokens from step 6, 4,096 from step 11"
    steps = [length_of(step, 7, 8, 64) for step in range(8)]
    firsts = [steps.index(length) + 1 for length in (8, 16, 32, 64)]
    assert growth(7, 8, 64) == (
        f"8 tokens from step {firsts[0]}, 16 tokens from step {firsts[1]}, 32 tokens from step {firsts[2]}, "
        f"64 from step {firsts[3]}"
    )
