"""Sinks and the gradient of the log-sum-exp, against the oracle in float64."""

import random

import pytest
import torch
import torch.distributed as dist

from longnet_dist import phantom_keys
from longnet_dist.attention.functional import dilated_attention
from longnet_dist.attention.kernels.reference import oracle
from longnet_dist.attention.stream import Stream
from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.geometry.pattern import DilatedPattern
from tests.attention.test_stream import usable
from tests.cases import random_case
from tests.distributed import run_distributed

BACKENDS = ("reference", "sdpa")


def with_sink(seed, ranks=1):
    """A random case, a sink of a random kind with some ``-inf`` in it, and a gradient of the log-sum-exp."""
    case, rng = random_case(seed, ranks), random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, rows, heads, _ = case.q.shape
    shape = rng.choice([(heads,), (rows, heads), (batch, rows, heads)])
    sink = 2 * torch.randn(shape, dtype=torch.float64, generator=generator)
    sink[torch.rand(shape, generator=generator) < 0.2] = -torch.inf
    dlse = torch.randn(batch, rows, heads, dtype=torch.float64, generator=generator)
    return case, sink, dlse


def gradients(out, lse, inputs, dout, dlse):
    """Gradients of out and lse together; a gradient of an lse of ``-inf`` counts as 0."""
    value = (out * dout).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * dlse).sum()
    return torch.autograd.grad(value, inputs)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def wanted(case, sink, dlse, causal):
    """Inputs, output, log-sum-exp and gradients of the oracle."""
    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, sink)]
    out, lse = oracle(*inputs[:3], case.pattern, causal=causal, sink=inputs[3])
    return inputs, [out, lse, *gradients(out, lse, inputs, case.dout, dlse)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(120))
def test_agrees_with_the_oracle(backend, seed):
    case, sink, dlse = with_sink(seed)
    inputs, expected = wanted(case, sink, dlse, case.causal)
    options = {"causal": case.causal, "backend": backend, "return_lse": True}
    out, lse = dilated_attention(*inputs[:3], case.pattern, sink=inputs[3], **options)
    assert_same([out, lse, *gradients(out, lse, inputs, case.dout, dlse)], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(30))
def test_the_log_sum_exp_has_its_gradient_without_a_sink(backend, seed):
    case, _, dlse = with_sink(seed)
    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    results = []
    for function, options in ((oracle, {}), (dilated_attention, {"backend": backend, "return_lse": True})):
        out, lse = function(*inputs, case.pattern, causal=case.causal, **options)
        results.append(gradients(out, lse, inputs, 0 * case.dout if seed % 3 == 0 else case.dout, dlse))
    assert_same(results[1], results[0])


def test_a_gradient_of_the_log_sum_exp_alone():
    q, k, v = (torch.randn(1, 9, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    _, lse = dilated_attention(q, k, v, DilatedPattern([4, 9], [1, 2]), return_lse=True)
    _, expected = oracle(q, k, v, DilatedPattern([4, 9], [1, 2]))
    dlse = torch.randn_like(lse)
    assert_same(torch.autograd.grad(lse, (q, k), dlse), torch.autograd.grad(expected, (q, k), dlse))


def test_no_sink_is_a_sink_of_no_weight():
    case = random_case(4)
    out, lse = dilated_attention(case.q, case.k, case.v, case.pattern, return_lse=True)
    none = torch.full((case.q.shape[2],), -torch.inf, dtype=torch.float64)
    assert_same(dilated_attention(case.q, case.k, case.v, case.pattern, return_lse=True, sink=none), (out, lse))


def test_a_sink_alone_gives_zero():
    """A row that no branch covers has output 0, log-sum-exp the sink, and no gradient but that of the log-sum-exp."""
    q, k, v = (torch.randn(1, 12, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sink = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    out, lse = dilated_attention(q, k, v, DilatedPattern([6], [3]), return_lse=True, sink=sink)
    bare = torch.arange(12) % 3 != 0
    assert (out[:, bare] == 0).all()
    torch.testing.assert_close(lse[:, bare], torch.full((1, 8, 1), 0.3, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(lse[:, bare].sum(), sink)
    assert gradient.item() == pytest.approx(8)


def errors_on_ranks(num_cases):
    """Largest error of this rank's results; of ``(H,)`` sinks the ranks' gradients are summed."""
    ranks, rank, worst = dist.get_world_size(), dist.get_rank(), 0.0
    for seed in range(num_cases):
        case, sink, dlse = with_sink(seed, ranks)
        _, expected = wanted(case, sink, dlse, case.causal)
        rows = slice(*case.shards.window(rank))
        part = sink if sink.dim() == 1 else sink[..., rows, :]
        local = [x[:, rows].clone().requires_grad_() for x in (case.q, case.k, case.v)] + [
            part.clone().requires_grad_()
        ]
        out, lse = dilated_attention(
            *local[:3], case.pattern, causal=case.causal, group=dist.group.WORLD, backend=BACKENDS[seed % 2],
            return_lse=True, sink=local[3],
        )  # fmt: skip
        actual = [out, lse, *gradients(out, lse, local, case.dout[:, rows], dlse[:, rows])]
        if sink.dim() == 1:
            dist.all_reduce(actual[-1])
        for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
            b = b if number == 5 and sink.dim() == 1 else b[..., rows, :] if number == 5 else b[:, rows]
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
            worst = max(worst, (a - b).nan_to_num().abs().max().item())
    return worst


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_agrees_with_the_oracle_on_every_rank(ranks):
    assert max(run_distributed(errors_on_ranks, ranks, 25)) < 1e-9


@pytest.mark.parametrize("seed", range(25))
def test_agrees_with_the_oracle_in_a_stream(seed):
    case, sink, dlse = with_sink(seed)
    _, expected = wanted(case, sink, dlse, True)
    rows = case.shards.total_rows
    length = random.Random(seed).choice([c for c in range(1, rows + 1) if usable(c, rows, 1)])
    stream, dsink = Stream(case.pattern, rows, 1), torch.zeros_like(sink)

    def chunk(shards, requires_grad):
        window = slice(*shards.window(0))
        part = sink if sink.dim() == 1 else sink[..., window, :]
        local = [x[:, window].clone().requires_grad_(requires_grad) for x in (case.q, case.k, case.v)]
        local.append(part.clone().requires_grad_(requires_grad))
        out, lse = dilated_attention(
            *local[:3], case.pattern, cache=stream.layers[0], sink=local[3], return_lse=True, backend=BACKENDS[seed % 2]
        )
        return window, local, out, lse

    for shards in stream.record(length):
        chunk(shards, False)
    for shards in stream.replay(length):
        window, local, out, lse = chunk(shards, True)
        *actual, part = gradients(out, lse, local, case.dout[:, window], dlse[:, window])
        assert_same([out, lse, *actual], [x[:, window] for x in expected[:5]])
        if sink.dim() == 1:
            dsink += part
        else:
            dsink[..., window, :] = part
    assert_same([dsink], expected[5:])


# The interpreter of Triton 3.6 turns arrays of one element into numbers, which NumPy 1.25 and later warn of.
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize("causal", [True, False])
def test_the_triton_kernels_take_a_sink(causal):
    """In the interpreter, float32; on a GPU the same kernels in bfloat16."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pattern = DilatedPattern([16, 32], [1, 2])
    inputs = [torch.randn(1, 40, heads, 16, device=device) for heads in (4, 2, 2)] + [torch.randn(4, device=device)]
    dout, dlse = torch.randn_like(inputs[0]), torch.randn(1, 40, 4, device=device)
    leaves, exact = [x.requires_grad_() for x in inputs], [x.detach().double().requires_grad_() for x in inputs]
    out, lse = dilated_attention(*leaves[:3], pattern, causal=causal, sink=leaves[3], backend="triton", return_lse=True)
    expected, expected_lse = oracle(*exact[:3], pattern, causal=causal, sink=exact[3])
    actual = [out, lse, *gradients(out, lse, leaves, dout, dlse)]
    wanted = [expected, expected_lse, *gradients(expected, expected_lse, exact, dout.double(), dlse.double())]
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3,), (2, 2), (9, 3), (1, 9, 2, 1), ()])
def test_a_sink_of_another_shape_is_refused(shape):
    q = torch.zeros(2, 9, 2, 4)
    with pytest.raises(ShapeError, match=r"\(2,\), \(9, 2\) or \(2, 9, 2\), but is"):
        dilated_attention(q, q, q, DilatedPattern([4], [1]), sink=torch.zeros(shape))


def test_a_sink_of_integers_is_refused():
    q = torch.zeros(2, 9, 2, 4)
    with pytest.raises(ShapeError, match="floating-point dtype"):
        dilated_attention(q, q, q, DilatedPattern([4], [1]), sink=torch.zeros(2, dtype=torch.int64))


def refusals():
    q = torch.zeros(1, 5, 2, 4)
    sink = torch.zeros(3 if dist.get_rank() == 1 else 2)
    with pytest.raises(ShapeError) as error:
        dilated_attention(q, q, q, DilatedPattern([4], [1]), group=dist.group.WORLD, sink=sink)
    return str(error.value)


def test_a_wrong_sink_on_one_rank_is_raised_on_all():
    first, second = run_distributed(refusals, 2)
    assert "rank 1 was refused" in first
    assert "but is (3,)" in second


def filled(pattern, total, heads):
    """torchscale's zero keys, counted one by one."""
    numbers = torch.zeros(total, heads, dtype=torch.int64)
    for branch in pattern:
        width, rate = min(branch.segment_length, total), branch.dilation_rate
        padded = -(-width // rate) * rate
        for head, offset in enumerate(pattern.offsets(branch, heads)):
            for start in range(0, total, width):
                kept = [start + place for place in range(offset, padded, rate)]
                zeros = sum(row >= min(start + width, total) for row in kept)
                for row in kept:
                    if row < min(start + width, total):
                        numbers[row, head] += zeros
    return numbers


@pytest.mark.parametrize("seed", range(40))
def test_phantom_keys_are_those_that_torchscale_fills_in(seed):
    rng = random.Random(seed)
    total, heads, branches = rng.randint(1, 40), rng.randint(1, 6), rng.randint(1, 3)
    lengths, rates = ([rng.randint(1, most) for _ in range(branches)] for most in (50, 7))
    pattern = DilatedPattern(lengths, rates, rng.choice(["modulo", "blocked"]))
    sink = phantom_keys(pattern, total, 2 * heads, heads)
    assert sink.shape == (total, 2 * heads)
    expected = filled(pattern, total, heads).repeat_interleave(2, 1)
    assert torch.equal(sink.exp().round().long(), expected)
    assert torch.equal(sink == -torch.inf, expected == 0)


def test_a_sequence_that_fills_its_segments_has_no_phantom_keys():
    assert (phantom_keys(DilatedPattern([8, 16], [1, 2]), 32, 4) == -torch.inf).all()
    with pytest.raises(ConfigError, match="N is 0"):
        phantom_keys(DilatedPattern([8], [1]), 0, 4)
    with pytest.raises(ConfigError, match=r"shift=\[3\]"):
        phantom_keys(DilatedPattern([8], [1], shift=[3]), 9, 4)


@pytest.mark.parametrize(
    "change", [{"N": 8.0}, {"N": None}, {"N": True}, {"heads": "4"}, {"heads": 4.0}, {"pattern": None}]
)
def test_phantom_keys_of_other_types_are_refused(change):
    with pytest.raises(ConfigError, match=r"but N is|must be integers|must be a DilatedPattern"):
        phantom_keys(**{"pattern": DilatedPattern([8], [1]), "N": 8, "heads": 4} | change)
