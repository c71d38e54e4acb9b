import pytest
import torch

from longnet_dist.attention.functional import AttentionSpec
from longnet_dist.geometry.pattern import DilatedPattern

pytest.importorskip("triton")
from longnet_dist.attention.kernels.triton.launch import Geometry, Problem


@pytest.mark.parametrize(("rows", "causal"), [(1000, True), (1000, False), (1024, True), (997, False)])
def test_the_copy_engine_sees_every_part_of_a_long_sequence(rows, causal):
    """Rates that do not divide the rows: the last segment is seen in buffers that begin some rows later."""
    q = torch.empty(1, rows, 12, 4)
    spec = AttentionSpec.of(
        q, q, q, DilatedPattern([16, 64, 128], [1, 6, 12]), causal, None, None, "auto", False, True, None, None
    )
    seen, first_rows = 0, set()
    for call in spec.dense_calls(12):
        for part in Problem(call, Geometry.of(q), Geometry.of(q)).parts():
            assert part.fits
            assert part.q.shape[1] == part.k.shape[1] == rows - part.first_row
            assert part.piece.window_start == part.first_row
            seen += (part.piece.query_stop - part.piece.query_start) * (12 // part.piece.dilation_rate)
            first_rows.add(part.first_row)
    assert first_rows == {0} | {rows % rate for rate in (6, 12)}
    assert seen == rows * (12 + 2 + 1)
