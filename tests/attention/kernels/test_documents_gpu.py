"""Packed documents on a GPU, in bfloat16: as exact as dense attention on the same documents."""

import random
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("triton")

from longnet_dist.attention.functional import dilated_attention
from longnet_dist.attention.kernels.hopper import support
from longnet_dist.attention.kernels.reference import oracle
from longnet_dist.attention.kernels.triton import kernel as triton_kernel
from longnet_dist.geometry.pattern import DilatedPattern

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def random_case(seed):
    """Few constants that kernels are compiled for, and any documents, padding, shifts and grouped heads."""
    rng = random.Random(seed)
    rows, kv_heads = rng.randint(200, 3000) // 8 * 8, rng.choice([2, 4])
    lengths, rates = rng.choice([([256, 512, 1024], [1, 2, 4]), ([300, 900], [1, 3]), ([512], [2])])
    shift = [rng.randrange(0, min(lengths), 8)] * len(lengths) if rng.random() < 0.3 else None
    count = rng.randint(2, 12)
    edges = sorted({*rng.sample(range(rows + 1), count), *(rng.choice([(), (rows // 2, rows // 2 + 1)]))})
    pattern = DilatedPattern(lengths, rates, "modulo", shift)
    return rng.choice([64, 128]), rows, kv_heads * rng.choice([1, 2]), kv_heads, edges, pattern, rng.random() < 0.7


def dense(q, k, v, pattern, causal):
    """Attention of all rows, in the dtype of the inputs."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


def dilated(q, k, v, pattern, causal):
    return oracle(q, k, v, pattern, causal=causal)[0]


def by_document(attend, tensors, dout, edges, pattern, causal, dtype):
    """Output and gradients of ``attend``, document by document."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    out = torch.zeros_like(leaves[0])
    for start, stop in pairwise(edges):
        out[:, start:stop] = attend(*(x[:, start:stop] for x in leaves), pattern, causal)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]


def errors(actual, wanted):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(actual, wanted, strict=True)]


@pytest.mark.parametrize("first", range(0, 50, 10))
def test_as_exact_as_dense_attention(first):
    for seed in range(first, first + 10):
        dim, rows, heads, kv_heads, edges, pattern, causal = random_case(seed)
        torch.manual_seed(seed)
        shapes = [(1, rows, number, dim) for number in (heads, kv_heads, kv_heads, heads)]
        q, k, v, dout = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = dilated_attention(*leaves, pattern, causal=causal, backend="triton", cu_seqlens=edges)
        actual = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
        common = dout, edges, pattern, causal
        own = errors(actual, by_document(dilated, (q, k, v), *common, torch.float64))
        half = by_document(dense, (q, k, v), *common, torch.bfloat16)
        others = errors(half, by_document(dense, (q, k, v), *common, torch.float64))
        for mine, theirs in zip(own, others, strict=True):
            assert mine <= 2 * theirs, (seed, own, others)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != support.COMPUTE_CAPABILITY,
    reason="needs a Hopper GPU",
)
@pytest.mark.parametrize("dim", [64, 128])
def test_documents_run_on_the_kernels_for_hopper(dim, monkeypatch):
    launches = triton_kernel._hopper(torch.device("cuda"))
    assert launches is not None
    made = []
    launch = launches.backward_launch
    monkeypatch.setattr(launches, "backward_launch", lambda *given: made.append(given) or launch(*given))
    pattern = DilatedPattern([256, 512], [1, 2])
    q, k, v, dout = (torch.randn(1, 1024, 2, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = dilated_attention(*leaves, pattern, backend="triton", cu_seqlens=[0, 33, 500, 1017])
    torch.autograd.grad(out, leaves, dout)
    assert len(made) == (2 if support.TABLES else 0)


@pytest.mark.parametrize("dim", [64, 128])
def test_a_document_is_bitwise_what_it_is_alone(dim):
    pattern = DilatedPattern([256, 512], [1, 2])
    q, k, v, dout = (torch.randn(1, 1000, 2, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))

    def attended(rows, edges):
        leaves = [x[:, rows].clone().requires_grad_() for x in (q, k, v)]
        out = dilated_attention(*leaves, pattern, backend="triton", deterministic=True, cu_seqlens=edges)
        return [out, *torch.autograd.grad(out, leaves, dout[:, rows])]

    whole = attended(slice(None), [0, 33, 700, 1000])
    for start, stop in ((0, 33), (33, 700), (700, 1000)):
        alone = attended(slice(start, stop), [0, stop - start])
        for a, b in zip(whole, alone, strict=True):
            assert torch.equal(a[:, start:stop], b)
