import pytest
import torch

from longnet_dist.attention.functional import dilated_attention
from longnet_dist.attention.kernels.reference import oracle
from longnet_dist.attention.stream import Stream
from longnet_dist.attention.weights import attention_weights
from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.geometry.pattern import DilatedPattern
from tests.cases import random_case

BACKENDS = ["reference", "sdpa"]


def gradients(out, inputs, dout):
    return torch.autograd.grad(out, inputs, dout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(200))
def test_agrees_with_the_oracle(backend, seed):
    case = random_case(seed)
    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    expected, expected_lse = oracle(*inputs, case.pattern, causal=case.causal)
    out, lse = dilated_attention(*inputs, case.pattern, causal=case.causal, backend=backend, return_lse=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-9)
    for actual, wanted in zip(gradients(out, inputs, case.dout), gradients(expected, inputs, case.dout), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    inputs = [torch.randn(1, 7, heads, 2, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    pattern = DilatedPattern([3, 7], [1, 2])
    assert torch.autograd.gradcheck(lambda *x: dilated_attention(*x, pattern, backend=backend, scale=0.3), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend):
    q, k, v = (torch.randn(1, 7, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for loss in (torch.sum, lambda x: x.square().sum()):  # the first gives a gradient without a graph
        out = dilated_attention(q, k, v, DilatedPattern([3, 7], [1, 2]), backend=backend)
        (once,) = torch.autograd.grad(loss(out), q, retain_graph=True)
        (gradient,) = torch.autograd.grad(loss(out), q, create_graph=True)
        assert torch.equal(gradient, once)
        with pytest.raises(ConfigError, match="no derivative of its own; leave out create_graph"):
            (out.sum() + gradient.square().sum()).backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_no_branch_covers_are_zero_with_zero_gradient(backend):
    q, k, v = (torch.randn(1, 12, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, lse = dilated_attention(q, k, v, DilatedPattern([6], [3]), backend=backend, return_lse=True)
    bare = torch.arange(12) % 3 != 0
    assert (out[:, bare] == 0).all()
    assert (lse[:, bare] == -torch.inf).all()
    assert lse[:, ~bare].isfinite().all()
    out.sum().backward()
    for x in (q, k, v):
        assert (x.grad[:, bare] == 0).all()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_are_read_in_place(backend):
    packed = torch.randn(2, 24, 3, 4, 8, dtype=torch.float64)
    strided = [x.requires_grad_() for x in packed.unbind(2)]
    whole = [x.detach().clone().contiguous().requires_grad_() for x in strided]
    pattern = DilatedPattern([8, 24], [1, 3])
    outs = [dilated_attention(*x, pattern, backend=backend) for x in (strided, whole)]
    torch.testing.assert_close(outs[0], outs[1])
    dout = torch.randn_like(outs[0])
    for a, b in zip(gradients(outs[0], strided, dout), gradients(outs[1], whole, dout), strict=True):
        torch.testing.assert_close(a, b)


def every_other_channel(x):
    """The same numbers, of which one lies between any two channels."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", range(3))
def test_channels_need_not_be_adjacent(backend, which):
    case = random_case(11)
    whole = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    given = [every_other_channel(x) if number == which else x for number, x in enumerate(whole)]
    outs = [dilated_attention(*x, case.pattern, causal=case.causal, backend=backend) for x in (whole, given)]
    torch.testing.assert_close(outs[1], outs[0])
    dout = every_other_channel(case.dout)
    for a, b in zip(gradients(outs[1], whole, dout), gradients(outs[0], whole, case.dout), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_keeps_its_dtype_and_stays_near(dtype, backend):
    case = random_case(3)
    inputs = [x.to(dtype).requires_grad_() for x in (case.q, case.k, case.v)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, lse = dilated_attention(*inputs, case.pattern, causal=case.causal, backend=backend, return_lse=True)
    expected, _ = oracle(*exact, case.pattern, causal=case.causal)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    dout = case.dout.to(dtype)
    pairs = zip(gradients(out, inputs, dout), gradients(expected, exact, dout.double()), strict=True)
    for actual, wanted in pairs:
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


def test_deterministic_gradients_are_bitwise_equal():
    case = random_case(5)
    results = []
    for _ in range(2):
        inputs = [x.float().requires_grad_() for x in (case.q, case.k, case.v)]
        out = dilated_attention(*inputs, case.pattern, causal=case.causal, deterministic=True)
        results.append(gradients(out, inputs, case.dout.float()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        (((4, 2, 8),) * 3, ("float32",) * 3, "batch, rows, heads, head_dim"),
        (((1, 0, 2, 8),) * 3, ("float32",) * 3, "empty"),
        (((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)), ("float32",) * 3, "divides"),
        (((1, 4, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8)), ("float32",) * 3, "batch, rows and head_dim"),
        (((1, 6, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)), ("float32",) * 3, "q must have as many rows as k"),
        (((1, 4, 2, 8),) * 3, ("float32", "float32", "float64"), "one dtype"),
        (((1, 4, 2, 8),) * 3, ("int64",) * 3, "one dtype"),
    ],
)
def test_bad_inputs_are_refused(shapes, dtypes, message):
    inputs = [torch.zeros(s, dtype=getattr(torch, d)) for s, d in zip(shapes, dtypes, strict=True)]
    with pytest.raises(ShapeError, match=message):
        dilated_attention(*inputs, DilatedPattern([4], [1]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": [0.0]}, ShapeError, "k must be a tensor, but is of type list"),
        ({"sink": 0.0}, ShapeError, "sink must be a tensor, but is of type float"),
        ({"q": torch.zeros(1, 4, 2, 8).to_sparse()}, ShapeError, "q must be a dense tensor, .*; use to_dense"),
        ({"causal": None}, ConfigError, "causal must be True or False, but is None"),
        ({"group": "world"}, ConfigError, "group must be a process group .*; use dist.group.WORLD"),
        ({"cache": Stream(DilatedPattern([4], [1]), 4, 1)}, ConfigError, r"use stream.layers\[i\]"),
        ({"pattern": ([4], [1])}, ConfigError, r"must be a DilatedPattern, such as .*, but is \(\[4\], \[1\]\)"),
    ],
)
def test_arguments_of_another_type_are_refused(change, error, message):
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(error, match=message):
        dilated_attention(**{"q": x, "k": x, "v": x, "pattern": DilatedPattern([4], [1])} | change)


@pytest.mark.parametrize("scale", [torch.inf, -torch.inf, torch.nan, True, "1", torch.tensor(0.5)])
def test_a_scale_that_is_no_finite_number_is_refused(scale):
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ConfigError, match=r"scale must be a finite number, .* multiply q by it"):
        dilated_attention(x, x, x, DilatedPattern([4], [1]), scale=scale)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("scale", [0.0, -0.7, -3])
def test_a_scale_may_be_0_or_negative(scale, backend):
    q, k, v = (torch.randn(2, 9, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = dilated_attention(q, k, v, DilatedPattern([9], [1]), scale=scale, backend=backend)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    weights = (scale * torch.einsum("bihd,bjhd->bhij", q, k)).masked_fill(hidden, -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad((x * x.detach().cos()).sum(), (q, k, v)) for x in (out, expected))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    kept = attention_weights(q, k, DilatedPattern([9], [1]), range(9), scale=scale)
    torch.testing.assert_close(kept, weights.transpose(1, 2), rtol=0, atol=1e-12)


def test_shapes_are_named_as_they_were_given():
    """Items with documents of their own are computed as one sequence."""
    q, k, v = (torch.zeros(2, 4, heads, 8) for heads in (4, 3, 3))
    with pytest.raises(ShapeError, match=r"q \(2, 4, 4, 8\), k \(2, 4, 3, 8\)"):
        dilated_attention(q, k, v, DilatedPattern([4], [1]), cu_seqlens=[[0, 4], [0, 3]])


def test_unknown_backend_is_refused():
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ConfigError, match="backend must be one of"):
        dilated_attention(x, x, x, DilatedPattern([4], [1]), backend="fast")


def test_total_rows_must_match_on_one_device():
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ShapeError, match="total_rows is 8"):
        dilated_attention(x, x, x, DilatedPattern([4], [1]), total_rows=8)
