import numpy as np
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
    turned = pattern.of_layer(1, offsets=True)
    assert len({pattern, turned, turned.of_layer(0, offsets=True), pattern.of_heads(1, 3, 2)}) == 3


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
        (np.array(4), [1], "modulo", "must be a list"),
        (np.array([4.0]), [1], "modulo", "must be positive integers"),
        ([4], [2**70], "modulo", r"dilation_rates must be at most 2\^40"),
        ([2**62], [1], "modulo", r"segment_lengths must be at most 2\^40, .*; a segment as long as the sequence"),
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


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        ([1], "2 segment_lengths"),
        ([0, 9], "9 in shift .* segment length 9; take it modulo 9"),
        ([4, 0], "below the segment length, but 4"),
        ([-1, 0], "at least 0 .*, but -1"),
        ([1.0, 0], r"must be an integer .*, but 1\.0"),
        ([True, 0], "but True"),
        ("00", "shift must be a list"),
        (3, "shift must be a list"),
    ],
)
def test_bad_shifts_are_refused(shift, message):
    with pytest.raises(ConfigError, match=message):
        DilatedPattern([4, 9], [1, 2], shift=shift)


def test_no_shift_is_a_shift_of_zero():
    plain = DilatedPattern([4, 9], [1, 2])
    assert plain == DilatedPattern([4, 9], [1, 2], shift=[0, 0]) != DilatedPattern([4, 9], [1, 2], shift=(0, 1))
    assert plain.shift == (0, 0)
    assert not plain.shifted
    assert "shift=[3, 0]" in repr(DilatedPattern([4, 9], [1, 2], shift=[3, 0]))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 4, 23, 40])
def test_flops_count_the_pairs_of_shifted_grids(causal, rows):
    pattern = DilatedPattern([4, 9, 50], [1, 2, 5], "blocked", shift=[3, 4, 17])
    pairs = attended_counts(pattern, rows, 3, causal).sum().item() * 2
    assert pattern.flops(rows, heads=6, head_dim=16, causal=causal, kv_heads=3) == 4 * 16 * pairs


def test_grids_that_begin_at_one_row():
    assert DilatedPattern([4, 6], [1, 1]).common_start == 0
    assert DilatedPattern([4, 6], [1, 1], shift=[1, 3]).common_start == 9
    assert DilatedPattern([4, 6], [1, 1], shift=[1, 2]).common_start is None
    assert DilatedPattern.paper().of_layer(1, shift=True).common_start == 10920


def test_layers_may_differ():
    pattern = DilatedPattern([8, 16, 32], [1, 2, 3])
    assert pattern.of_layer(3) == pattern.of_layer(2, shift=True) == pattern
    shifted = pattern.of_layer(3, shift=True)  # 32 / 3, rounded down to a multiple of 6
    assert shifted.shift == (6, 6, 6)
    assert shifted == pattern.of_layer(1, shift=True)
    turned = pattern.of_layer(4, offsets=True)
    assert [turned.offsets(branch, 4) for branch in turned] == [(0, 0, 0, 0), (0, 1, 0, 1), (1, 2, 0, 1)]
    assert pattern.of_layer(6, offsets=True) == pattern
    blocked = DilatedPattern([32], [3], "blocked").of_layer(2, offsets=True)
    assert blocked.offsets(blocked.branches[0], 6) == (2, 2, 0, 0, 1, 1)


@pytest.mark.parametrize("rule", ["modulo", "blocked"])
@pytest.mark.parametrize("layer", [0, 2])
def test_some_heads_of_a_model_keep_their_offsets(rule, layer):
    pattern = DilatedPattern([32, 64], [3, 4], rule).of_layer(layer, offsets=True)
    part = pattern.of_heads(5, 12, 3)
    for branch in pattern:
        offsets, block, before = part.offsets(branch, 3), part.head_block(branch, 3), part.heads_before(branch, 3)
        assert offsets == pattern.offsets(branch, 12)[5:8]
        assert offsets == tuple((head + before) // block % branch.dilation_rate for head in range(3))
    assert part.of_model == pattern
    assert pattern.of_heads(0, 3, 3) == pattern.of_heads(0, None, 3) == pattern


@pytest.mark.parametrize(
    ("first", "total", "message"),
    [(-1, 4, "at least 0"), (2, 4, "heads 2 … 4 of this call are not all among 4"), (1.5, 4, "first_head must be an")],
)
def test_heads_that_a_model_does_not_have_are_refused(first, total, message):
    with pytest.raises(ConfigError, match=message):
        DilatedPattern([4], [1]).of_heads(first, total, 3)
