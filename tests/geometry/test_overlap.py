"""Every pair counts once for each branch that has it, whichever branch computes it."""

import random
from collections import Counter
from math import log2

import pytest
import torch

from longnet_dist.geometry.overlap import Overlap, computed_share, overlaps
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import compact_piece, dense_pieces, shared_segments

HEADS = 5


def pieces_of(pattern, start, stop, total, causal, merged):
    pieces = [*dense_pieces(pattern, start, stop, total, causal)]
    pieces += [compact_piece(pattern, s, start, stop) for s in shared_segments(pattern, start, stop, total, causal)]
    return [x for piece in pieces for x in overlaps(pattern)[piece.branch].split(piece, causal)] if merged else pieces


def pairs(pattern, pieces, causal):
    """Count ``(head, query row, key row)`` over the pieces, and the pairs that are computed."""
    counts, computed = Counter(), 0
    for piece in pieces:
        rate = piece.dilation_rate
        for head, offset in enumerate(pattern.offsets(pattern.branches[piece.branch], HEADS)):
            for segment in range(piece.first_segment, piece.first_segment + piece.num_segments):
                _, queries, first = piece.queries(segment, offset)
                _, keys, _ = piece.keys(segment, offset)
                start = piece.bounds(segment)[0] + offset
                first_half = abs(piece.half) - (0 if piece.table is None else int(piece.table.leads[segment]))
                for j in range(first, first + queries):
                    for i in range(keys):
                        here = i <= j or not causal
                        if piece.half > 0:
                            here = offset + i * rate < first_half <= offset + j * rate
                        if piece.half < 0:
                            here = offset + j * rate < first_half <= offset + i * rate
                        if here:
                            alike = [
                                (x - (head + pattern.turn) // rate) % share == 0
                                for x in (i, j)
                                for share in piece.overlap_rates
                            ]
                            half = len(alike) // 2
                            times = 1 + sum(a and b for a, b in zip(alike[:half], alike[half:], strict=True))
                            counts[head, start + j * rate, start + i * rate] += times
                            computed += 1
    return counts, computed


PATTERNS = [
    DilatedPattern([8, 16, 32], [1, 2, 4]),
    DilatedPattern([8, 16, 32, 64, 96], [1, 2, 4, 6, 12]),
    DilatedPattern([8, 8, 16, 16], [1, 2, 2, 4]),
    DilatedPattern([12, 24, 48], [3, 3, 6]),
    DilatedPattern([8, 16, 32], [1, 4, 8]),
    DilatedPattern([10, 20, 40], [1, 2, 4]),
    DilatedPattern([8, 16, 32], [1, 2, 4], "blocked"),
    DilatedPattern([4, 8, 16, 32, 64], [1, 2, 4, 8, 16]),
    DilatedPattern([8, 16, 32], [1, 2, 4], shift=[4, 12, 12]),
    DilatedPattern([8, 16, 32], [1, 2, 4], shift=[4, 12, 28]),
    DilatedPattern([8, 16, 32], [1, 2, 4], shift=[0, 8, 24]),
    DilatedPattern([8, 16, 32], [1, 2, 4], shift=[3, 3, 3]),
    DilatedPattern([8, 16, 32], [1, 2, 4], shift=[2, 10, 10]),
    DilatedPattern([8, 16, 32, 64], [1, 2, 4, 8], shift=[3, 5, 21, 21]),
    DilatedPattern([8, 16, 32, 64], [1, 2, 4, 8]).of_layer(3, offsets=True, shift=True),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("window", [(0, 96, 96), (0, 77, 77), (16, 48, 96), (13, 61, 90), (70, 71, 90)])
def test_every_pair_counts_as_often_as_branches_hold_it(pattern, window, causal):
    plain, all_pairs = pairs(pattern, pieces_of(pattern, *window, causal, False), causal)
    merged, computed = pairs(pattern, pieces_of(pattern, *window, causal, True), causal)
    assert merged == plain
    assert computed <= all_pairs == plain.total()
    if window[0] == 0 and window[1] == window[2]:
        assert computed / all_pairs == pytest.approx(computed_share(pattern, window[2], HEADS, causal))


def test_random_patterns():
    draw = random.Random(0)
    for number in range(80):
        count = draw.randint(1, 5)
        pattern = DilatedPattern(
            [draw.choice([4, 6, 8, 12, 16, 24, 32]) for _ in range(count)],
            [draw.choice([1, 2, 3, 4, 6, 8]) for _ in range(count)],
        )
        if number % 2:
            row = draw.choice([1, 2, 3, 4, 8, 12, 20])
            pattern = DilatedPattern(
                pattern.segment_lengths, pattern.dilation_rates, shift=[row % w for w in pattern.segment_lengths]
            )
        total = draw.randint(1, 70)
        start = draw.randrange(total)
        window = start, draw.randint(start + 1, total), total
        causal = draw.random() < 0.5
        merged, plain = (pairs(pattern, pieces_of(pattern, *window, causal, x), causal)[0] for x in (True, False))
        assert merged == plain


def test_a_child_is_merged_where_all_its_segments_split_at_an_edge_of_the_parent():
    def halves(shift, rates=(1, 2)):
        return [x.half for x in overlaps(DilatedPattern([8, 16], rates, shift=shift))]

    assert halves([0, 0]) == halves([0, 8]) == halves([4, 4]) == halves([4, 12]) == halves([6, 14]) == [0, 8]
    assert halves([3, 3]) == [0, 8]  # the first segments are the same
    assert halves([3, 11]) == [0, 0]  # 3 rows before the edge, which 2 does not divide
    assert halves([3, 11], (1, 1)) == [0, 8]
    assert halves([0, 4]) == halves([4, 0]) == halves([1, 2]) == [0, 0]
    paper = DilatedPattern.paper()
    assert [x.half for x in overlaps(paper.of_layer(1, shift=True))] == [x.half for x in overlaps(paper)]


def test_chains_of_the_known_patterns():
    assert overlaps(DilatedPattern.paper()) == (
        Overlap(0, (2, 4)), Overlap(2048, (2,)), Overlap(4096), Overlap(), Overlap()
    )  # fmt: skip
    geometric = overlaps(DilatedPattern.geometric(2048, 2**20))
    assert [x.half for x in geometric] == [0, *(2048 << i for i in range(6)), 0, 2048 << 7, 2048 << 8]
    assert geometric[0].overlap_rates == (2, 4, 8, 16, 32, 64)  # the next would not repeat in a tile
    assert geometric[7].overlap_rates == (2, 4)
    equal = overlaps(DilatedPattern([4 << i for i in range(11)], [1] * 11))  # of more than a kernel has columns for
    assert [len(x.overlap_rates) for x in equal] == [8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 0]
    assert overlaps(DilatedPattern([8, 16], [1, 2], "blocked")) == (Overlap(), Overlap())


def test_a_quarter_fewer_pairs():
    pattern = DilatedPattern.geometric(32, 512)
    merged, plain = (pairs(pattern, pieces_of(pattern, 0, 512, 512, True, x), True)[1] for x in (True, False))
    assert 0.74 < merged / plain < 0.78


def test_columns_give_the_logarithm_of_a_multiplicity():
    """The bf16 columns of ``kernels.triton.tiles.multiplicity_columns`` add up to ``log2 m``."""
    for level in range(7):
        summands = [torch.tensor(log2((t + 2) / (t + 1)) / 0.18) for t in range(level)]
        rounded = [x.bfloat16().float() for x in summands]
        rest = [(x - y).bfloat16().float() for x, y in zip(summands, rounded, strict=True)]
        assert abs(0.18 * sum(map(float, rounded + rest)) - log2(level + 1)) < 2e-5
