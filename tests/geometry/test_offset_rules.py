import pytest

from longnet_dist.errors import ConfigError
from longnet_dist.geometry.offset_rules import OFFSET_RULES, OffsetRule
from longnet_dist.geometry.overlap import overlaps
from longnet_dist.geometry.pattern import DilatedPattern
from tests.registries import temporary_entries


@pytest.fixture
def register():
    """Registers rules for one test."""
    with temporary_entries(OFFSET_RULES):
        yield OFFSET_RULES.register


@pytest.mark.parametrize("name", OFFSET_RULES.names())
def test_rules_give_what_they_promise(name):
    for rate in range(1, 9):
        pattern = DilatedPattern([16], [rate], name)
        for heads in range(1, 13):
            offsets = pattern.offsets(pattern.branches[0], heads)
            block = pattern.head_block(pattern.branches[0], heads)
            assert len(offsets) == heads
            assert all(0 <= offset < rate for offset in offsets)
            assert block is None or offsets == tuple(head // block % rate for head in range(heads))


@pytest.mark.parametrize("found", [(0, 1), (0, 1, 4), (0, -1, 1)])
def test_offsets_outside_the_rate_are_refused(register, found):
    @register("wrong")
    class Wrong(OffsetRule):
        offsets = staticmethod(lambda rate, heads: found)

    pattern = DilatedPattern([8], [4], "wrong")
    with pytest.raises(ConfigError, match=r"'wrong' gives \[.*\] for 3 heads and rate 4; correct the rule"):
        pattern.offsets(pattern.branches[0], 3)


def test_a_closed_form_that_is_another_is_refused(register):
    """Kernels would otherwise compute other pairs than the reference, without a word."""

    @register("closed")
    class Closed(OffsetRule):
        offsets = staticmethod(lambda rate, heads: tuple(rate - 1 - head % rate for head in range(heads)))
        head_block = staticmethod(lambda rate, heads: 1)

    pattern = DilatedPattern([8], [4], "closed")
    with pytest.raises(ConfigError, match=r"'closed' has b=1 and gives \[3, 2, 1\]"):
        pattern.head_block(pattern.branches[0], 3)


def test_only_the_papers_offsets_merge_overlaps(register):
    @register("eager")
    class Eager(OffsetRule):
        merges_overlaps = True
        offsets = staticmethod(lambda rate, heads: (0,) * heads)

    lengths, rates = [16, 32], [1, 2]
    assert any(overlap.half for overlap in overlaps(DilatedPattern(lengths, rates)))
    assert not any(overlap.half for overlap in overlaps(DilatedPattern(lengths, rates, "blocked")))
    pattern = DilatedPattern(lengths, rates, "eager")
    with pytest.raises(ConfigError, match=r"overlaps can be merged only .* 'eager' .* head_block is None"):
        pattern.head_block(pattern.branches[1], 3)
