import pytest

from longnet_dist.attention.kernels.reference import attended_counts
from longnet_dist.errors import ConfigError
from longnet_dist.geometry.pattern import DilatedPattern


def test_geometric_reaches_the_longest_with_constant_keys_a_segment():
    pattern = DilatedPattern.geometric(base=4, longest=30, ratio=3)
    assert pattern.segment_lengths == (4, 12, 36)
    assert pattern.dilation_rates == (1, 3, 9)


def test_geometric_of_a_short_sequence_is_one_dense_branch():
    assert DilatedPattern.geometric(base=2048, longest=5) == DilatedPattern([2048], [1])


def test_paper_pattern():
    assert DilatedPattern.paper() == DilatedPattern([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12])


def test_is_immutable_and_hashable():
    pattern = DilatedPattern([4], [2])
    with pytest.raises(AttributeError):
        pattern.head_offsets = "blocked"
    assert {pattern: 1}[DilatedPattern([4], [2])] == 1
    assert pattern != DilatedPattern([4], [2], "blocked")


def test_offsets():
    modulo, blocked = DilatedPattern([8], [4]), DilatedPattern([8], [4], "blocked")
    assert modulo.offsets(modulo.branches[0], 6) == (0, 1, 2, 3, 0, 1)
    assert blocked.offsets(blocked.branches[0], 6) == (0, 0, 1, 1, 2, 2)
    assert blocked.offsets(blocked.branches[0], 3) == (0, 1, 2)


@pytest.mark.parametrize(
    ("lengths", "rates", "offsets", "message"),
    [
        ([], [], "modulo", "segment_lengths is empty"),
        ([4, 8], [1], "modulo", "2 segment_lengths"),
        ([0], [1], "modulo", "segment_lengths must be positive integers, but 0"),
        ([4], [-1], "modulo", "dilation_rates must be positive integers, but -1"),
        ([4.0], [1], "modulo", r"but 4\.0"),
        ([True], [1], "modulo", "but True"),
        ("48", [1], "modulo", "must be a list"),
        (4, 1, "modulo", "must be a list"),
        ([4], [1], "random", "head_offsets must be one of blocked, modulo"),
    ],
)
def test_bad_patterns_are_refused(lengths, rates, offsets, message):
    with pytest.raises(ConfigError, match=message):
        DilatedPattern(lengths, rates, offsets)


@pytest.mark.parametrize(("base", "longest", "ratio"), [(0, 8, 2), (4, 0, 2), (4, 8, 1)])
def test_bad_geometric_patterns_are_refused(base, longest, ratio):
    with pytest.raises(ConfigError):
        DilatedPattern.geometric(base, longest, ratio)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("offsets", ["modulo", "blocked"])
@pytest.mark.parametrize("rows", [1, 7, 23, 40])
def test_flops_counts_every_attended_pair(causal, offsets, rows):
    pattern = DilatedPattern([4, 9, 50], [1, 2, 5], offsets)
    pairs = attended_counts(pattern, rows, 3, causal).sum().item() * 2
    assert pattern.flops(rows, heads=6, head_dim=16, causal=causal, kv_heads=3) == 4 * 16 * pairs


def test_flops_is_linear_in_the_rows():
    pattern = DilatedPattern.geometric(2048, 2**30)
    short, long = (DilatedPattern.geometric(2048, n).flops(n, 12, 64, True) / n for n in (2**20, 2**30))
    assert 1 < long / short < 1.01
    assert pattern.flops(2**30, 12, 64, True) == round(long * 2**30)


def test_flops_refuses_heads_that_do_not_divide():
    with pytest.raises(ConfigError, match="multiple"):
        DilatedPattern([4], [1]).flops(8, heads=6, head_dim=8, causal=True, kv_heads=4)
