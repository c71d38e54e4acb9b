import random

import pytest
import torch

from longnet_dist.attention.functional import dilated_attention
from longnet_dist.attention.stream import Stream
from longnet_dist.errors import ConfigError
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.kernels.reference import oracle

pytest.importorskip("triton")
# The interpreter of Triton 3.6 turns arrays of one element into numbers, which NumPy 1.25 and later warn of.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def attended(q, k, v, dout, pattern, **options):
    """Output and gradients of the backend, and those of the oracle in float64."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = dilated_attention(*leaves, pattern, backend="triton", **options)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected, _ = oracle(*exact, pattern, causal=options.get("causal", True))
    return (
        [out, *torch.autograd.grad(out, leaves, dout)],
        [expected, *torch.autograd.grad(expected, exact, dout.double())],
    )


def inputs(rows, heads, kv_heads, dim, batch=1, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, rows, h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


# Ragged N, w % r != 0, N % r != 0, r > w, w > N, a first branch that leaves rows out, grouped heads, a head dim that
# needs padding, a batch, both head offsets, both masks.
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "dim", "batch", "lengths", "rates", "offsets", "causal"),
    [
        (40, 2, 2, 16, 1, [16, 32], [1, 2], "modulo", True),
        (41, 2, 1, 16, 2, [18, 50], [4, 3], "modulo", True),
        (39, 3, 3, 20, 1, [39, 7], [1, 9], "blocked", False),
        (67, 2, 2, 16, 1, [33], [2], "modulo", False),
    ],
)
def test_agrees_with_the_oracle(rows, heads, kv_heads, dim, batch, lengths, rates, offsets, causal, deterministic):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    pattern = DilatedPattern(lengths, rates, offsets)
    q, k, v, dout = inputs(rows, heads, kv_heads, dim, batch)
    actual, expected = attended(q, k, v, dout, pattern, causal=causal, deterministic=deterministic)
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_a_stream_takes_keys_from_compact_buffers():
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    pattern = DilatedPattern([8, 40], [1, 3])
    q, k, v, _ = inputs(40, 2, 2, 16)
    expected, _ = oracle(q.double(), k.double(), v.double(), pattern)
    stream = Stream(pattern, 40, 1)
    for shards in stream.forward(13):
        rows = slice(*shards.window(0))
        local = [x[:, rows].contiguous() for x in (q, k, v)]
        out = dilated_attention(*local, pattern, backend="triton", cache=stream.layers[0])
        assert (out - expected[:, rows]).abs().max() < 1e-5


def test_refuses_what_it_cannot_run():
    q, k, v, _ = (x.double() for x in inputs(8, 1, 1, 16))
    with pytest.raises(ConfigError, match="float32 in Triton's interpreter"):
        dilated_attention(q, k, v, DilatedPattern([8], [1]), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", range(10))
def test_agrees_with_the_oracle_on_a_gpu(seed):
    rng = random.Random(seed)
    rows, kv_heads = rng.randint(200, 2300), rng.randint(1, 3)
    pattern = DilatedPattern([rng.randint(50, rows) for _ in range(3)], [rng.randint(1, 8) for _ in range(3)])
    dim, dtype = rng.choice([32, 64, 80, 96, 128, 256]), rng.choice([torch.bfloat16, torch.float16])
    q, k, v, dout = inputs(rows, kv_heads * rng.choice([1, 3]), kv_heads, dim, 2, "cuda", dtype, seed)
    actual, expected = attended(q, k, v, dout, pattern, causal=rng.random() < 0.5, deterministic=rng.random() < 0.5)
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() < 0.006 * b.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_deterministic_gradients_are_bitwise_equal():
    q, k, v, dout = inputs(1500, 4, 2, 64, 2, "cuda", torch.bfloat16)
    pattern = DilatedPattern([300, 900], [1, 3])
    runs = [attended(q, k, v, dout, pattern, deterministic=True)[0] for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
