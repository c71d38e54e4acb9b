import math

import pytest
import torch
import torch.distributed as dist

from longnet_dist.attention.functional import AttentionSpec, dilated_attention
from longnet_dist.attention.kernels.reference import oracle
from longnet_dist.attention.stream import Stream
from longnet_dist.errors import ConfigError
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import Shards
from tests.distributed import run_distributed

pytest.importorskip("triton")
from longnet_dist.attention.kernels.triton.kernel import TritonKernel

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


def streamed(q, k, v, pattern, chunk):
    """The output of a causal stream; keys of the chunks before come in compact buffers."""
    stream, parts = Stream(pattern, q.shape[1], 1), []
    for shards in stream.forward(chunk):
        local = [x[:, slice(*shards.window(0))].contiguous() for x in (q, k, v)]
        parts.append(dilated_attention(*local, pattern, backend="triton", cache=stream.layers[0]))
    return torch.cat(parts, 1)


# Ragged N, w % r != 0, N % r != 0, r > w, w > N, a first branch that leaves rows out, also with whole tiles of keys
# alone, grouped heads, a head dim that needs padding, a batch, both head offsets, both masks.
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "dim", "batch", "lengths", "rates", "offsets", "causal"),
    [
        (40, 2, 2, 16, 1, [16, 32], [1, 2], "modulo", True),
        (41, 2, 1, 16, 2, [18, 50], [4, 3], "modulo", True),
        (39, 3, 3, 20, 1, [39, 7], [1, 9], "blocked", False),
        (67, 2, 2, 16, 1, [33], [2], "modulo", False),
        (128, 2, 2, 16, 1, [64], [2], "modulo", False),
        (95, 4, 4, 16, 1, [16, 32], [3, 6], "modulo", True),
        (95, 2, 1, 16, 2, [17, 30], [3, 4], "blocked", False),
        # Branches that overlap: in tiles longer and shorter than their period; a chain that begins at r = 2.
        (150, 3, 3, 16, 1, [16, 32, 64, 24], [1, 2, 4, 3], "modulo", True),
        (141, 2, 1, 16, 1, [64, 128], [1, 64], "modulo", True),
        (100, 4, 4, 16, 1, [24, 48], [2, 8], "modulo", True),
        (70, 2, 2, 16, 1, [64, 32], [1, 1], "modulo", True),
        (150, 3, 3, 16, 1, [32, 64, 24], [1, 2, 3], "modulo", False),
        (140, 2, 1, 16, 1, [64, 128], [2, 8], "modulo", False),
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


def test_channels_need_not_be_adjacent():
    """The gradient that ``out.sum()`` gives has one number for all channels, tokens and heads."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    pattern = DilatedPattern([8, 16], [1, 2])
    q, k, v, dout = inputs(20, 2, 1, 16)
    for expanded in (torch.ones(()), torch.ones(16), dout[..., :1], dout[:, :, :1], dout[:, :1]):
        actual, expected = attended(q, k, v, expanded.expand_as(dout), pattern)
        for a, b in zip(actual, expected, strict=True):
            assert (a - b).abs().max() < 1e-5
    for x in (q, k, v):  # channels that are 40 numbers apart
        x.set_(x.transpose(1, 3).contiguous().transpose(1, 3))
    actual, expected = attended(q, k, v, dout, pattern)
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # on a GPU no news
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rise", [8, -8])
def test_scores_of_any_size(causal, rise):
    """Scores that rise or fall by hundreds within a row, so that no guess at their maximum holds."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    q, k, v, dout = inputs(80, 2, 2, 16)
    ramp = torch.linspace(-rise, rise, 80)[None, :, None, None]
    actual, expected = attended(q.abs() * 8, k.abs() * ramp, v, dout, DilatedPattern([80, 80], [1, 2]), causal=causal)
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() < 1e-3 * (1 + b.abs().max())


def test_statistics_stand_where_dq_will():
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    out, dout, scratch = (torch.randn(2, 9, 3, 16).half() for _ in range(3))
    lse, dq = torch.randn(2, 9, 3), torch.ones(2, 9, 3, 16)
    (statistics,) = TritonKernel().start_backward(dout, out, lse, dq, scratch)
    assert statistics.untyped_storage().data_ptr() == scratch.untyped_storage().data_ptr()
    assert (statistics[..., 0] - lse / math.log(2)).abs().max() < 1e-6
    assert (statistics[..., 1] - (out.float() * dout.float()).sum(-1)).abs().max() < 1e-5
    assert not dq.any()
    (again,) = TritonKernel().start_backward(dout, out, lse, dq.fill_(1), None, statistics[..., 1].clone())
    assert torch.equal(again, statistics)
    assert not dq.any()


def test_a_stream_takes_keys_from_compact_buffers():
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    for pattern in (DilatedPattern([8, 40], [1, 3]), DilatedPattern([8, 16, 32], [1, 2, 4])):
        q, k, v, _ = inputs(40, 2, 2, 16)
        expected, _ = oracle(q.double(), k.double(), v.double(), pattern)
        assert (streamed(q, k, v, pattern, 13) - expected).abs().max() < 1e-5


def test_refuses_what_it_cannot_run():
    q, k, v, _ = (x.double() for x in inputs(8, 1, 1, 16))
    with pytest.raises(ConfigError, match="float32 in Triton's interpreter"):
        dilated_attention(q, k, v, DilatedPattern([8], [1]), backend="triton")


def errors_on_a_rank(total, lengths, rates, causal, streamed):
    """Largest difference of this rank's rows from the oracle; segments whose keys it took from others."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    pattern, shards = DilatedPattern(lengths, rates), Shards.even(total, ranks)
    q, k, v, dout = inputs(total, 4, 2, 16)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected, _ = oracle(*exact, pattern, causal=causal)
    wanted = [expected, *torch.autograd.grad(expected, exact, dout.double())]
    rows = slice(*shards.window(rank))
    local = [x[:, rows].clone().requires_grad_() for x in (q, k, v)]
    group = dist.group.WORLD
    cache = None
    if streamed:  # as training does, whose step is a stream of one chunk
        stream = Stream(pattern, total, 1, num_ranks=ranks, rank=rank, causal=causal)
        assert not list(stream.record(total))
        next(stream.replay(total))
        cache = stream.layers[0]
    out = dilated_attention(
        *local, pattern, causal=causal, group=group, backend="triton", total_rows=total, cache=cache
    )
    actual = [out, *torch.autograd.grad(out, local, dout[:, rows])]
    spec = AttentionSpec.of(*local, pattern, causal, None, group, "triton", False, True, total, cache)
    taken = [(s.branch, s.index, s.stop) for s in spec.shared()]
    return max((a - b[:, rows]).abs().max().item() for a, b in zip(actual, wanted, strict=True)), taken


# Segments of four ranks and more: a later branch's keys come from the ranks of its first half alone, and only to those
# behind it; halves that end inside a slice; without a causal mask all rows travel.
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
@pytest.mark.parametrize(
    ("ranks", "total", "lengths", "rates", "causal", "streamed"),
    [
        (4, 64, [16, 32, 64], [1, 2, 4], True, False),
        (4, 64, [16, 32, 64], [1, 2, 4], True, True),
        (3, 77, [20, 40, 80], [1, 2, 2], True, False),
        (2, 60, [16, 32, 64], [1, 2, 4], False, False),
    ],
)
def test_ranks_whose_branches_overlap(ranks, total, lengths, rates, causal, streamed):
    results = run_distributed(errors_on_a_rank, ranks, total, lengths, rates, causal, streamed)
    assert max(error for error, _ in results) < 2e-5
    if (ranks, causal) == (4, True):
        assert [taken for _, taken in results] == [[], [(1, 0, 16)], [(2, 0, 32)], [(1, 1, 48), (2, 0, 32)]]


# Each row compiles kernels of its own, two to five seconds each, and so they are few. In turn: the kernel for Hopper
# with grouped heads and merged overlaps; with the last segment outside the copy engine's view; at D 128, the same and
# causal with merged overlaps; the portable kernels, a head dim that needs padding, twice the same bits, without and
# with merged overlaps; the widest head dim.
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dim", "dtype", "kv_heads", "group", "rows", "lengths", "rates", "causal", "deterministic"),
    [
        (64, torch.bfloat16, 2, 2, 2048, [512, 1024, 2048], [1, 2, 4], True, False),
        (64, torch.bfloat16, 3, 1, 1501, [700, 1501], [2, 3], False, False),
        (128, torch.bfloat16, 2, 2, 1501, [700, 1501], [2, 3], False, False),
        (128, torch.bfloat16, 2, 2, 1501, [512, 1024, 2048], [1, 4, 8], True, False),
        (64, torch.bfloat16, 2, 1, 2000, [512, 1024, 2048], [1, 2, 8], False, False),
        (128, torch.bfloat16, 2, 1, 2000, [512, 1024, 2048], [1, 2, 8], False, False),
        (80, torch.float16, 1, 3, 999, [300, 999], [2, 5], False, True),
        (80, torch.float16, 1, 3, 999, [256, 512], [1, 2], True, True),
        (256, torch.bfloat16, 1, 1, 640, [640], [1], True, False),
    ],
)
def test_agrees_with_the_oracle_on_a_gpu(dim, dtype, kv_heads, group, rows, lengths, rates, causal, deterministic):
    q, k, v, dout = inputs(rows, kv_heads * group, kv_heads, dim, 2, "cuda", dtype)
    options = {"causal": causal, "deterministic": deterministic}
    actual, expected = attended(q, k, v, dout, DilatedPattern(lengths, rates), **options)
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() < 0.006 * b.norm()
    if deterministic:
        again, _ = attended(q, k, v, dout, DilatedPattern(lengths, rates), **options)
        assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rise", [8, -8])
@pytest.mark.parametrize("batch", [1, 48])  # many: a program of the Hopper forward takes several tiles of queries
def test_scores_of_any_size_on_a_gpu(rise, batch):
    rows = 1088  # the last tile of queries is short
    q, k, v, _ = inputs(rows, 6, 6, 128, batch, "cuda", torch.bfloat16)
    ramp = torch.linspace(-rise, rise, rows, device="cuda", dtype=q.dtype)[None, :, None, None]
    q, k, pattern = q.abs() * 4, k.abs() * ramp, DilatedPattern([512, rows], [1, 2])
    out = dilated_attention(q, k, v, pattern, backend="triton", causal=False)
    for part in (slice(1), slice(batch - 1, batch)):
        expected, _ = oracle(*(x[part].double() for x in (q, k, v)), pattern, causal=False)
        assert (out[part] - expected).norm() < 0.006 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_stream_on_a_gpu():
    pattern = DilatedPattern([256, 512, 1024], [1, 2, 4])
    for dim in (64, 128):
        q, k, v, _ = inputs(1024, 4, 2, dim, 1, "cuda", torch.bfloat16)
        expected, _ = oracle(q.double(), k.double(), v.double(), pattern)
        assert (streamed(q, k, v, pattern, 360) - expected).norm() < 0.006 * expected.norm()
