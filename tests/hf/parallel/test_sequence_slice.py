"""Slices of all ranks are the whole, and attention over them is that over the whole."""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from longnet_dist import DilatedPattern, dilated_attention
from longnet_dist.hf.parallel.sequence_slice import SequenceSlice
from tests.distributed import run_distributed

PATTERN = DilatedPattern([8, 32], [1, 4])
MASK = torch.ones(2, 21, dtype=torch.int64)
MASK[1, :6] = 0


def test_one_device_holds_the_whole():
    piece = SequenceSlice.of(21, None)
    assert (piece.start, piece.rows, piece.edges) == (0, 21, None)
    assert torch.equal(piece.cut(MASK), MASK)


def sliced(rows, masked, causal):
    torch.manual_seed(0)
    tensors = [torch.randn(2, rows, heads, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    mask = MASK[:, :rows] if masked else None
    piece = SequenceSlice.of(rows, dist.group.WORLD, mask)
    q, k, v = (piece.cut(x) for x in tensors)
    return piece.start, piece.rows, piece.attend(q, k, v, PATTERN, causal=causal, scale=0.3), piece.calls


@pytest.mark.parametrize(
    ("rows", "ranks", "masked"),
    [(21, 2, False), (21, 3, True), (20, 2, True), (9, 4, False), (9, 4, True), (2, 3, False)],
)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_slices_is_that_over_the_whole(rows, ranks, masked, causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, rows, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    edges = [[0, rows], [6, rows]] if masked else None
    expected = dilated_attention(q, k, v, PATTERN, causal=causal, scale=0.3, cu_seqlens=edges)
    found = run_distributed(sliced, ranks, rows, masked, causal)
    assert [start for start, *_ in found] == [rank * -(-rows // ranks) for rank in range(ranks)]
    assert {count for *_, count in found} == {1}
    torch.testing.assert_close(torch.cat([out for *_, out, _ in found], 1)[:, :rows], expected)
