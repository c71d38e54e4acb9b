import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
from longnet_dist.attention.kernels.triton import decode

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")


def problem(texts, heads, group, slots, dim, device="cpu", dtype=torch.float32):
    """Queries, records with one slot more than is seen, and random slots that are; one head sees nothing."""
    generator = torch.Generator().manual_seed(slots)
    q = torch.randn(texts, heads, group, dim, generator=generator).to(device, dtype)
    records = torch.randn(2, texts, heads, slots + 1, dim, generator=generator).to(device, dtype)
    seen = (torch.rand(texts, heads, slots, generator=generator) < 0.4).to(device)
    seen[0, 0] = False
    seen[-1, -1] = True
    nothing = ~seen.any(-1, keepdim=True)
    keys, values = records[:, :, :, :-1]
    return q, keys, values, seen | nothing, nothing


def exact(q, keys, values, seen, nothing):
    parts = (x.double() for x in (q, keys, values))
    return F.scaled_dot_product_attention(*parts, attn_mask=seen.unsqueeze(2)).masked_fill(nothing.unsqueeze(2), 0)


# Fewer slots than a block, several parts of unequal lengths, a dim that is no power of two, groups of heads.
@on_a_cpu
@pytest.mark.parametrize("shape", [(1, 2, 1, 7, 16), (2, 1, 1, 300, 16), (1, 2, 3, 200, 24), (3, 2, 2, 65, 32)])
def test_agrees_with_float64(shape):
    given = problem(*shape)
    torch.testing.assert_close(decode.attend_to_slots(*given).double(), exact(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(1, 12, 1, 11607, 64), (64, 4, 3, 5000, 64), (2, 8, 4, 3000, 128)])
def test_agrees_with_float64_on_a_gpu(shape):
    given = problem(*shape, device="cuda", dtype=torch.bfloat16)
    out, expected = decode.attend_to_slots(*given), exact(*given)
    assert (out - expected).norm() < 0.004 * expected.norm()
