import math
from decimal import Decimal, localcontext

import pytest
import torch

from longnet_dist.attention.kernels.reference import attended_counts
from longnet_dist.attention.positions import Positions, attending_span
from longnet_dist.errors import ConfigError
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.position_encodings import TWO_PI

PATTERN = DilatedPattern([8, 32], [1, 2])
BILLION = 2**30


def heads(rows, dtype=torch.float64, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, 3, dim, dtype=torch.float64, generator=generator).to(dtype)


def scores(q, k):
    return torch.einsum("bnhd,bmhd->bhnm", q, k)


@pytest.mark.parametrize("xpos_base", [None, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_scores_near_a_billion_are_those_near_zero(xpos_base, dtype, tolerance):
    q, k = heads(32, dtype), heads(32, dtype, seed=1)
    positions = Positions(xpos_base=xpos_base)
    near = scores(*positions(q, k, PATTERN, 0, BILLION + 64))
    for start in (BILLION, BILLION + 32, 32 * 12345):
        torch.testing.assert_close(
            scores(*positions(q, k, PATTERN, start, BILLION + 64)), near, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("row", [1, BILLION - 1, BILLION + 12345, 2**40 + 1])
def test_angles_are_right_to_the_last_bits(row):
    theta, dim = 10000.0, 16
    table, _ = Positions(theta).table(PATTERN, row, 1, row + 1, dim, torch.float64, torch.device("cpu"))
    cos, sin = table.unbind(-1)
    with localcontext() as context:
        context.prec = 60
        angles = [float(row * Decimal(theta) ** (Decimal(-2 * i) / dim) % TWO_PI) for i in range(dim // 2)]
    # 2^-65 turns a row is all the error there is, beside that of one float64
    tolerance = 1e-15 + row * 2**-65 * 2 * math.pi
    assert [abs(c - math.cos(a)) < tolerance for c, a in zip(cos.flatten().tolist(), angles, strict=True)] == [True] * 8
    assert [abs(s - math.sin(a)) < tolerance for s, a in zip(sin.flatten().tolist(), angles, strict=True)] == [True] * 8


@pytest.mark.parametrize("xpos_base", [None, 16])
def test_scores_follow_the_definition(xpos_base):
    """Complex numbers: a pair is z, its place a factor (zeta^(1/base) e^{i theta})^n; keys take the inverse scale."""
    rows, dim = 20, 16
    q, k = heads(rows), heads(rows, seed=1)
    n = torch.arange(rows, dtype=torch.float64).view(-1, 1, 1)
    i = torch.arange(dim // 2, dtype=torch.float64)
    rotation = torch.exp(1j * n * 10000 ** (-2 * i / dim))
    scale = ((2 * i / dim + 0.4) / 1.4) ** (n / xpos_base) if xpos_base else 1.0
    expected = torch.einsum(
        "bnhd,bmhd->bhnm",
        torch.view_as_complex(q.unflatten(-1, (-1, 2))) * rotation * scale,
        (torch.view_as_complex(k.unflatten(-1, (-1, 2))) * rotation / scale).conj(),
    ).real
    torch.testing.assert_close(scores(*Positions(xpos_base=xpos_base)(q, k, PATTERN, 0, rows)), expected)


@pytest.mark.parametrize("xpos_base", [None, 16])
def test_slices_are_rows_of_the_whole(xpos_base):
    q, k = heads(70), heads(70, seed=1)
    positions = Positions(xpos_base=xpos_base)
    whole = positions(q, k, PATTERN, 0, 70)
    for start, stop in ((0, 27), (27, 54), (54, 70)):
        for part, x in zip(positions(q[:, start:stop], k[:, start:stop], PATTERN, start, 70), whole, strict=True):
            assert torch.equal(part, x[:, start:stop])


@pytest.mark.parametrize(("lengths", "rows", "span"), [([8, 32], 10**9, 32), ([8, 32], 20, 20), ([6, 4], 100, 12)])
def test_span_holds_every_segment(lengths, rows, span):
    pattern = DilatedPattern(lengths, [1] * len(lengths))
    assert attending_span(pattern, rows) == span
    for width in lengths:
        for row in range(0, min(rows, 200), width):
            assert row // span == (min(row + width, rows) - 1) // span


@pytest.mark.parametrize("rows", [3, 11, 30, 90])
@pytest.mark.parametrize("shift", [[3, 11], [0, 8], [3, 4]], ids=str)
def test_spans_begin_where_all_grids_do(shift, rows):
    """xPos in a shifted pattern gives every pair of rows that attend the same score as with one span for all rows."""
    pattern = DilatedPattern([8, 16], [1, 2], shift=shift)
    assert attending_span(pattern, rows) == (min(16, rows) if shift[1] != 4 else rows)
    q, k = heads(rows), heads(rows, seed=1)
    whole = scores(*Positions(xpos_base=64)(q, k, DilatedPattern([rows], [1]), 0, rows))
    found = scores(*Positions(xpos_base=64)(q, k, pattern, 0, rows))
    seen = attended_counts(pattern, rows, 3, True).bool()
    torch.testing.assert_close(found.masked_fill(~seen, 0.0), whole.masked_fill(~seen, 0.0))


def test_layers_with_other_grids_share_the_tables_of_rope():
    positions, q = Positions(), heads(8)
    positions(q, q, PATTERN, 8, 64)
    tables = positions._cached
    positions(q, q, PATTERN.of_layer(1, shift=True), 8, 64)
    assert positions._cached is tables


def test_the_paper_fits_and_stays_finite_at_the_edges_of_its_span():
    positions, pattern = Positions(xpos_base=512), DilatedPattern.paper()
    q = heads(1, torch.bfloat16)
    for start in (BILLION, BILLION + 32767):
        scaled_q, scaled_k = positions(q, q, pattern, start, BILLION + 32768)
        assert scaled_q.dtype == torch.bfloat16
        exact = (q.float() ** 2).sum(-1)
        torch.testing.assert_close((scaled_q.float() * scaled_k.float()).sum(-1), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("dtype", "base"), [(torch.float32, 463), (torch.float16, 3702)])
def test_too_long_a_span_is_refused_with_the_smallest_base_that_works(dtype, base):
    pattern = DilatedPattern.paper()
    with pytest.raises(ConfigError, match=f"32768 rows .*use xpos_base={base} or more, or rope"):
        Positions(xpos_base=base - 1).check(pattern, BILLION, 64, dtype)
    Positions(xpos_base=base).check(pattern, BILLION, 64, dtype)
    Positions(xpos_base=16).check(pattern, 128, 64, dtype)  # no row is farther than the sequence is long
    Positions().check(DilatedPattern([BILLION], [1]), BILLION, 64, dtype)


def test_odd_head_dim_is_refused():
    with pytest.raises(ConfigError, match="head_dim is 5"):
        Positions()(heads(4, dim=5), heads(4, dim=5), PATTERN, 0, 4)


def test_tables_are_made_once_a_window_and_serve_training_after_inference():
    positions, q = Positions(xpos_base=16), heads(8).requires_grad_()
    with torch.inference_mode():
        positions(q, q, PATTERN, 8, 64)
    tables = positions._cached
    out, _ = positions(q, q, PATTERN, 8, 64)
    assert positions._cached is tables
    out.sum().backward()
    assert q.grad.abs().sum() > 0
    positions(q, q, PATTERN, 16, 64)
    assert positions._cached is not tables


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"theta": 0.5}, "theta must be a number of at least 1, not 0.5"),
        ({"theta": math.nan}, "theta must be a number of at least 1"),
        ({"theta": "10"}, "theta must be a number of at least 1"),
        ({"xpos_base": 0}, "xpos_base must be a positive number of rows, not 0"),
        ({"xpos_base": 5.5}, "xpos_base must be a positive number of rows, not 5.5"),
    ],
    ids=str,
)
def test_bases_out_of_range_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Positions(**given)
