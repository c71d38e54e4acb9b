"""A rule of offsets from one new file runs on every backend, over ranks and in streams."""

from importlib import import_module

import pytest
import torch
import torch.distributed as dist

from longnet_dist.attention.functional import dilated_attention
from longnet_dist.attention.kernels.reference import oracle
from longnet_dist.attention.stream import Stream
from longnet_dist.geometry.offset_rules import OFFSET_RULES
from longnet_dist.geometry.pattern import DilatedPattern
from tests.distributed import run_distributed

# "reversed" keeps equal offsets evenly apart; "squares" does not, so that kernels cannot take a stride for granted.
RULES = """\
from longnet_dist.geometry.offset_rules import OFFSET_RULES, OffsetRule


@OFFSET_RULES.register("reversed")
class Reversed(OffsetRule):
    @staticmethod
    def offsets(rate, heads):
        return tuple(rate - 1 - head % rate for head in range(heads))


@OFFSET_RULES.register("squares")
class Squares(OffsetRule):
    @staticmethod
    def offsets(rate, heads):
        return tuple((head * head + 1) % rate for head in range(heads))
"""
NEW = ("reversed", "squares")
LENGTHS, RATES = [16, 32, 40], [1, 2, 5]

# The interpreter of Triton 3.6 turns arrays of one element into numbers, which NumPy 1.25 and later warn of.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def new_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules")
    (folder / "new_offset_rules.py").write_text(RULES)
    known = dict(OFFSET_RULES._entries)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import_module("new_offset_rules")
        yield
    for name in set(OFFSET_RULES._entries) - set(known) - OFFSET_RULES._files:
        del OFFSET_RULES._entries[name]


def inputs(rows, dtype, heads=14, kv_heads=7, dim=16):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, rows, h, dim, dtype=dtype, generator=generator) for h in (heads, kv_heads, kv_heads, heads)]


def differences(rule, backend, causal, dtype):
    """The largest of output and gradients from the oracle."""
    *tensors, dout = inputs(70, dtype)
    pattern = DilatedPattern(LENGTHS, RATES, rule)
    leaves = [x.clone().requires_grad_() for x in tensors]
    exact = [x.double().requires_grad_() for x in tensors]
    out = dilated_attention(*leaves, pattern, causal=causal, backend=backend)
    expected, _ = oracle(*exact, pattern, causal=causal)
    pairs = [(out, expected)]
    gradients = torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, exact, dout.double())
    pairs += zip(*gradients, strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("rule", NEW)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_every_backend_agrees_with_the_oracle(rule, causal, backend):
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the interpreter is off where there is a GPU")
        assert differences(rule, backend, causal, torch.float32) < 1e-4
    else:
        assert differences(rule, backend, causal, torch.float64) < 1e-9


def test_a_deterministic_backward_of_triton_takes_the_table_too():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    *tensors, dout = inputs(40, torch.float32)
    pattern = DilatedPattern([40], [3], "reversed")
    results = []
    for deterministic in (False, True):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = dilated_attention(*leaves, pattern, backend="triton", deterministic=deterministic)
        results.append(torch.autograd.grad(out, leaves, dout))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def over_ranks(rule):
    q, k, v, _ = inputs(66, torch.float64)
    pattern = DilatedPattern(LENGTHS, RATES, rule)
    expected, _ = oracle(q, k, v, pattern)
    rows = slice(dist.get_rank() * 22, (dist.get_rank() + 1) * 22)
    out = dilated_attention(q[:, rows], k[:, rows], v[:, rows], pattern, group=dist.group.WORLD)
    return (out - expected[:, rows]).abs().max().item()


@pytest.mark.parametrize("rule", NEW)
def test_ranks_exchange_the_rows_of_a_new_rule(rule):
    assert max(run_distributed(over_ranks, 3, rule)) < 1e-9


@pytest.mark.parametrize("rule", NEW)
def test_a_stream_keeps_the_rows_of_a_new_rule(rule):
    q, k, v, _ = inputs(66, torch.float64)
    pattern = DilatedPattern(LENGTHS, RATES, rule)
    stream, parts = Stream(pattern, 66, 1), []
    for shards in stream.forward(13):
        rows = slice(*shards.window(0))
        parts.append(dilated_attention(q[:, rows], k[:, rows], v[:, rows], pattern, cache=stream.layers[0]))
    assert (torch.cat(parts, 1) - oracle(q, k, v, pattern)[0]).abs().max() < 1e-9
