from pathlib import Path

import pytest
import torch

from longnet_dist.attention.functional import dilated_attention
from longnet_dist.attention.module import DilatedAttention
from longnet_dist.attention.positions import Positions
from longnet_dist.attention.stream import Stream
from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.geometry.pattern import DilatedPattern

CASES = torch.load(Path(__file__).parents[1] / "data" / "torchscale_cases.pt", weights_only=True)
PATTERN = DilatedPattern([8, 32], [1, 2])
# torchscale's xPos angles are float32 whatever the dtype
TOLERANCE = {"xpos_causal": 1e-5, "float32_subln": 1e-5}


def torchscale_module(name):
    spec = CASES[name]["spec"]
    module = DilatedAttention(
        spec["dim"],
        spec["heads"],
        DilatedPattern(spec["segment_length"], spec["dilated_ratio"], "blocked"),
        causal=spec["causal"],
        positions=Positions(xpos_base=512) if spec["xpos"] else None,
        sub_norm=spec["subln"],
    ).to(CASES[name]["x"].dtype)
    state = {key: value for key, value in CASES[name]["state_dict"].items() if key != "xpos.scale"}  # a constant
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize("name", CASES)
def test_output_is_torchscales(name):
    tolerance = TOLERANCE.get(name, 1e-12)
    out = torchscale_module(name)(CASES[name]["x"])
    torch.testing.assert_close(out, CASES[name]["out"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_gradient_differs_from_torchscales_by_its_detached_weights_alone(name):
    """torchscale takes the mixture weights for constants; with the same mistake made on purpose, gradients agree."""
    case, module = CASES[name], torchscale_module(name)
    x = case["x"].clone().requires_grad_()
    stored, tolerance = case["grad_x"], TOLERANCE.get(name, 1e-12)
    q, k, v = (p(x).unflatten(-1, (-1, module.head_dim)) for p in (module.q_proj, module.k_proj, module.v_proj))
    if module.positions is not None:
        q, k = module.positions(q, k, module.pattern, 0, x.shape[1])
    branches = [DilatedPattern([b.segment_length], [b.dilation_rate], "blocked") for b in module.pattern]
    results = [dilated_attention(q, k, v, b, causal=module.causal, return_lse=True) for b in branches]
    weights = torch.stack([lse.detach() for _, lse in results]).softmax(0)
    mixed = sum(weight[..., None] * out for weight, (out, _) in zip(weights, results, strict=True))
    out = module.out_proj(module.inner_attn_ln(mixed.flatten(-2)))
    (detached,) = torch.autograd.grad(out, x, case["cot"])
    torch.testing.assert_close(detached, stored, rtol=tolerance, atol=tolerance)

    (exact,) = torch.autograd.grad(module(x), x, case["cot"])
    assert (exact - stored).norm() > 0.1 * stored.norm()


@pytest.mark.parametrize(
    "options", [{"sinks": True}, {"kv_heads": 2, "qk_norm": True, "sub_norm": True, "causal": False}]
)
def test_gradients_are_those_of_finite_differences(options):
    torch.manual_seed(0)
    module = DilatedAttention(8, 4, PATTERN, positions=Positions(xpos_base=64), **options).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x, atol=1e-6)


def test_a_sink_is_one_more_key_of_value_zero():
    """Against the definition: a softmax over the keys and the sink, of which the sink's part is left out."""
    torch.manual_seed(0)
    module = DilatedAttention(8, 2, DilatedPattern([16], [1]), sinks=True).double()
    with torch.no_grad():
        module.sinks.copy_(torch.tensor([0.7, -2.0]))
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    q, k, v = (part.transpose(1, 2) for part in module.project(x, None))
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
    sinks = module.sinks.view(1, 2, 1, 1).expand(1, 2, 9, 1)
    weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    expected = module.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), expected)
    with torch.no_grad():
        module.sinks.fill_(-1e4)
    without = DilatedAttention(8, 2, DilatedPattern([16], [1])).double()
    without.load_state_dict({name: value for name, value in module.state_dict().items() if name != "sinks"})
    torch.testing.assert_close(module(x), without(x))


def test_grouped_heads_are_repeated_key_value_heads():
    torch.manual_seed(0)
    grouped = DilatedAttention(24, 6, DilatedPattern([8], [1]), kv_heads=2).double()
    full = DilatedAttention(24, 6, DilatedPattern([8], [1])).double()
    state = grouped.state_dict()
    for key in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        state[key] = state[key].unflatten(0, (2, 4)).repeat_interleave(3, 0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    torch.testing.assert_close(grouped(x), full(x))


def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant():
    torch.manual_seed(0)
    module = DilatedAttention(16, 4, PATTERN, qk_norm=True, norm_eps=1e-12).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    before = module(x)
    with torch.no_grad():
        module.q_proj.weight *= 100
        module.k_proj.weight *= 100
    torch.testing.assert_close(module(x), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 10, "heads": 4}, "dim=10 and heads=4"),
        ({"dim": 16, "heads": 4, "kv_heads": 3}, "kv_heads=3"),
        ({"dim": 12, "heads": 4, "positions": Positions()}, "must be even"),
    ],
)
def test_impossible_heads_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        DilatedAttention(pattern=PATTERN, **arguments)


def test_a_tuple_is_no_pattern():
    with pytest.raises(ConfigError, match="must be a DilatedPattern"):
        DilatedAttention(16, 4, ([4], [1]))


@pytest.mark.parametrize("shape", [(1, 8, 12), (8, 16)])
def test_rows_of_another_width_are_refused(shape):
    with pytest.raises(ShapeError, match=r"x must be \(batch, rows, dim\) with dim=16, but is "):
        DilatedAttention(16, 4, PATTERN)(torch.zeros(shape))


def test_rows_that_do_not_fit_are_refused():
    module, x = DilatedAttention(16, 4, PATTERN), torch.zeros(1, 8, 16)
    with pytest.raises(ShapeError, match=r"begin at global row 0 .* start is 8"):
        module(x, start=8)
    with pytest.raises(ShapeError, match="8 rows and total_rows is 16"):
        module(x, total_rows=16)


def test_arguments_of_another_type_are_refused():
    pattern = DilatedPattern([4], [1])
    with pytest.raises(ConfigError, match="positions must be a Positions or None, not 'rope'; use"):
        DilatedAttention(8, 2, pattern, positions="rope")
    with pytest.raises(ConfigError, match="heads must divide dim"):
        DilatedAttention("8", 2, pattern)
    with pytest.raises(ConfigError, match=r"cache must be that of a layer .*; use stream.layers\[i\]"):
        DilatedAttention(8, 2, pattern)(torch.zeros(1, 4, 8), cache=Stream(pattern, 4, 1))
