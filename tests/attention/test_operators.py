"""Calls go through torch.compile and torch.export without a graph break, and equal those outside."""

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

from longnet_dist import DilatedAttention, DilatedPattern, LongNet, Positions, dilated_attention, named_model
from longnet_dist.attention.operators import attention, rotations  # noqa: F401 (register the operators)
from longnet_dist.attention.stream import Stream
from tests.distributed import run_distributed

PATTERN = DilatedPattern([8, 20, 64], [1, 2, 4], shift=[3, 4, 0]).of_layer(1, offsets=True)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    """A compiled function, in which a graph break is an error."""
    return torch.compile(function, fullgraph=True, backend=backend)


def tensors(rows=50, queries=None):
    torch.manual_seed(0)
    shapes = (queries or rows, 4), (rows, 2), (rows, 2)
    return [torch.randn(2, n, h, 8, dtype=torch.float64, requires_grad=True) for n, h in shapes]


def assert_same(results, others):
    for a, b in zip(results, others, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


OPTIONS = [
    {},
    {"causal": False, "scale": 0.3, "backend": "reference"},
    {"cu_seqlens": [0, 9, 50]},
    {"cu_seqlens": [[0, 50], [3, 8, 20]]},
    {"cu_seqlens": torch.tensor([0, 9, 40]), "deterministic": True},
    {"first_head": 3, "total_heads": 7},
    {"total_rows": 50},
]


@pytest.mark.parametrize("queries", [50, 7])
@pytest.mark.parametrize("sink", [None, (4,), (4, 4)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_call_is_one_graph(options, sink, queries):
    leaves = tensors(queries=queries)
    if sink:
        leaves.append(torch.randn((queries, 4) if len(sink) == 2 else sink, dtype=torch.float64, requires_grad=True))

    def call(*given):
        own = given[3] if len(given) > 3 else None
        out, lse = dilated_attention(given[0] * 2, *given[1:3], PATTERN, sink=own, return_lse=True, **options)
        return out.sin(), lse.masked_fill(lse == -torch.inf, 0.0).cos()

    actual, expected = compiled(call)(*leaves), call(*leaves)
    assert_same(actual, expected)
    assert_same(*(torch.autograd.grad(out.sum() + lse.sum(), leaves) for out, lse in (actual, expected)))


@pytest.mark.parametrize("cu_seqlens", [[], [[], []], [0, 50.0]], ids=str)
def test_a_graph_refuses_wrong_edges(cu_seqlens):
    q, k, v = tensors()
    with pytest.raises(Exception, match=r"at least one document|one list of edges|integers|int\[\]"):
        compiled(lambda *x: dilated_attention(*x, PATTERN, cu_seqlens=cu_seqlens))(q, k, v)


@pytest.mark.filterwarnings("ignore:.?torch.jit.script_method:DeprecationWarning")  # of torch's compiler itself
def test_it_compiles_with_inductor():
    leaves = tensors()

    def call(q, k, v):
        return (dilated_attention(q.cos(), k, v, PATTERN) * 3).relu()

    actual, expected = compiled(call, "inductor")(*leaves), call(*leaves)
    assert_same([actual], [expected])
    assert_same(*(torch.autograd.grad(out.square().sum(), leaves) for out in (actual, expected)))


def test_other_documents_need_no_other_graph():
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(dilated_attention, fullgraph=True, backend=counter)
    leaves = tensors()
    for edges in ([0, 9, 50], [0, 20, 30], [4, 5, 50]):
        given = torch.tensor(edges)
        assert_same([call(*leaves, PATTERN, cu_seqlens=given)], [dilated_attention(*leaves, PATTERN, cu_seqlens=edges)])
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck of torch 2.15
@pytest.mark.parametrize("short", [False, True])
def test_the_operators_keep_torchs_rules(short):
    """Schema, fake tensors, autograd and compiled calls, as torch checks them."""
    q, k, v = tensors(30, 11 if short else None)
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    grid = [8, 16], [1, 2], "modulo", [0, 3], 1
    given = (sink, torch.tensor([0, 4, 30]), [], [], *grid, True, None, "sdpa", False, None, 0, None)
    torch.library.opcheck(torch.ops.longnet_dist.attention, (q, k, v, *given))
    like = torch.zeros(0, 8, dtype=torch.float64)
    torch.library.opcheck(torch.ops.longnet_dist.rotations, (like, 2, 30, "xpos", 1e4, 64, None, [0, 9, 30], [], *grid))


@pytest.mark.parametrize("positions", [None, Positions(), Positions(xpos_base=64)], ids=["none", "rope", "xpos"])
def test_a_layer_is_one_graph(positions):
    options = {"qk_norm": True, "sinks": True, "sub_norm": True}
    layer = DilatedAttention(32, 4, PATTERN, kv_heads=2, positions=positions, **options).double()
    x = torch.randn(2, 50, 32, dtype=torch.float64, requires_grad=True)
    call = compiled(layer)
    for edges in (None, [0, 9, 50], [[0, 50], [3, 8, 20]]):
        actual, expected = call(x, cu_seqlens=edges), layer(x, cu_seqlens=edges)
        assert_same([actual], [expected])
        inputs = [x, *layer.parameters()]
        assert_same(*(torch.autograd.grad(out.square().sum(), inputs) for out in (actual, expected)))


@pytest.mark.parametrize("strict", [False, True])
def test_a_layer_is_exported(strict):
    layer = DilatedAttention(32, 4, PATTERN, kv_heads=2, positions=Positions())
    x = torch.randn(2, 50, 32)
    program = torch.export.export(layer, (x,), strict=strict)
    assert_same([program.module()(x)], [layer(x)])


# What Dynamo does to follow the autograd function of the loss.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_model_is_one_graph():
    model = LongNet(named_model("tiny", vocab_size=64, layer_shift=True)).double()
    tokens = torch.randint(0, 64, (2, 300))
    call = compiled(model)
    assert_same([call(tokens).logits], [model(tokens).logits])
    edges = [0, 100, 300]
    actual, expected = (f(tokens, tokens, cu_seqlens=edges).loss for f in (call, model))
    assert_same([actual], [expected])
    parameters = list(model.parameters())
    assert_same(*(torch.autograd.grad(loss, parameters) for loss in (actual, expected)))


def over_ranks():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 20, 2, 8) for _ in range(3))
    pattern, rows = DilatedPattern([8, 20], [1, 2]), slice(10 * dist.get_rank(), 10 * dist.get_rank() + 10)

    def call(q, k, v):
        return dilated_attention(q + 0, k, v, pattern, group=dist.group.WORLD) + 0

    out = torch.compile(call, backend="eager")(*(x[:, rows] for x in (q, k, v)))
    torch.testing.assert_close(out, dilated_attention(q, k, v, pattern)[:, rows])
    return True


def test_over_ranks_a_call_stays_outside_the_graph():
    assert all(run_distributed(over_ranks, 2))


def test_in_a_stream_a_call_stays_outside_the_graph():
    leaves, stream = [x.detach() for x in tensors()], Stream(PATTERN, 50, 1)
    expected = dilated_attention(*leaves, PATTERN)

    def call(q, k, v):
        return dilated_attention(q * 1, k, v, PATTERN, cache=stream.layers[0])

    for shards in stream.forward(20):
        out = torch.compile(call, backend="eager")(*(x[:, slice(*shards.window(0))] for x in leaves))
        assert_same([out], [expected[:, slice(*shards.window(0))]])
