import shutil
from functools import partial

import pytest
import torch
import torch.distributed as dist

from longnet_dist.config.model import LongNetConfig
from longnet_dist.engine.execution import Execution
from longnet_dist.engine.rows import RowParts
from longnet_dist.model.longnet import LongNet
from longnet_dist.ops.compiled import _compiled
from tests.distributed import run_distributed

EXECUTIONS = (
    Execution("none", tile=7),
    Execution("selective"),
    Execution("selective", offload=True, tile=7),
    Execution("full", tile=10),
    Execution("selective", cache_qkv=2, offload=True, tile=7),
    Execution("selective", cache_qkv=3, offload=True, offload_qkv=2),
    Execution("full", offload=True),
    Execution("selective", offload=True, resident=2),
    Execution("full", offload=True, resident=9),
)


def model_config(**fields):
    sizes = {"dim": 16, "layers": 3, "heads": 4, "kv_heads": 2, "ffn_dim": 24, "loss_chunk": 10, "xpos_base": 64}
    pattern = {"segment_lengths": (8, 20, 64), "dilation_rates": (1, 2, 4)}
    return LongNetConfig(**(sizes | pattern | fields))


def gradients(execution, rows, batch=2, group=None, chunk=None, **fields):
    """Loss sum and all gradients of this rank's rows of a sequence of ``rows``, whole or streamed in chunks."""
    torch.manual_seed(0)
    model = LongNet(model_config(**fields), group=group, execution=execution).double()
    with torch.no_grad():
        for vector in (parameter for parameter in model.parameters() if parameter.dim() == 1):
            vector += torch.randn_like(vector) / 4  # the norms' weights would all be 1 and 0
    tokens = torch.randint(256, (batch, rows))
    labels = tokens.roll(-1, 1)
    stream = model.stream(rows)
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for shards in stream.record(chunk or rows):
            part = slice(*shards.window(stream.rank))
            model(tokens[:, part], labels[:, part], stream=stream)
    for shards in stream.replay(chunk or rows):
        part = slice(*shards.window(stream.rank))
        loss = model(tokens[:, part], labels[:, part], stream=stream).loss_sum
        loss.backward()
        total += loss.detach()
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11)


FIELDS = {
    "causal": {},
    "bidirectional": {"qk_norm": True, "causal": False},
    "gated": {"ffn": "gated", "qk_norm": True},
    "sinks": {"sinks": True},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
def test_gradients_do_not_depend_on_the_execution(execution, fields):
    assert_same(gradients(execution, 31, **fields), gradients(Execution(), 31, **fields))


@pytest.mark.parametrize("ffn", ["plain", "gated"])
@pytest.mark.parametrize("execution", EXECUTIONS[2:4], ids=str)
def test_nor_those_of_a_stream(execution, ffn):
    assert_same(gradients(execution, 50, chunk=19, ffn=ffn), gradients(Execution(), 50, ffn=ffn))


def gradients_on_ranks(executions, rows, chunk, ffn):
    return [gradients(execution, rows, group=dist.group.WORLD, chunk=chunk, ffn=ffn) for execution in executions]


@pytest.mark.parametrize(("ranks", "chunk", "ffn"), [(2, None, "plain"), (3, None, "gated"), (2, 24, "plain")])
def test_nor_those_of_ranks(ranks, chunk, ffn):
    """Every rank has the same part of loss and gradients, and all parts together are the whole."""
    results = run_distributed(gradients_on_ranks, ranks, (Execution(), *EXECUTIONS[2:4]), 50, chunk, ffn)
    for plain, *others in results:
        for other in others:
            assert_same(other, plain)
    loss, whole = gradients(Execution(), 50, ffn=ffn)
    assert_same(sum(plain[0] for plain, *_ in results), loss)
    for name, gradient in whole.items():
        assert_same(sum(plain[1][name] for plain, *_ in results), gradient)


class Counter:
    """Counts the calls of a kernel."""

    def __init__(self, monkeypatch):
        from longnet_dist.attention.kernels.backends.sdpa import SdpaKernel

        self.forwards, forward = 0, SdpaKernel.forward

        def counted(kernel, *given):
            self.forwards += 1
            forward(kernel, *given)

        monkeypatch.setattr(SdpaKernel, "forward", counted)


@pytest.mark.parametrize(("checkpointing", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_selective_computes_no_attention_again(monkeypatch, checkpointing, times):
    counter = Counter(monkeypatch)
    gradients(Execution("none"), 31)
    once = counter.forwards
    gradients(Execution(checkpointing), 31)
    assert counter.forwards - once == times * once > 0


def kept_bytes(execution, rows):
    """Bytes of the tensors that a forward leaves for its backward, without the weights."""
    torch.manual_seed(0)
    model, seen = LongNet(model_config(layers=1), execution=execution), {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.data_ptr() for parameter in model.parameters()}
    saved = []
    block = model.blocks[0]
    if block.engine:
        make = block.engine._saved_tensors
        block.engine._saved_tensors = lambda: saved.append(make()) or saved[-1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(torch.randn(1, rows, 16, requires_grad=True))
    for tensor in (tensor for tensors in saved for tensor in tensors._kept.values()):
        pack(tensor)
    return sum(size for pointer, size in seen.items() if pointer not in own)


def test_what_is_kept_is_what_the_table_says():
    """ARCHITECTURE.md, "Memory of a step": float32, E = 16, H = 4, of 1,000 rows."""
    rows, dim, heads = 1000, 16, 4
    assert kept_bytes(Execution("full"), rows) == rows * 4 * dim
    assert kept_bytes(Execution("selective"), rows) == rows * 4 * (2 * dim + heads)
    kept = Execution("selective", cache_qkv=1)
    assert kept_bytes(kept, rows) == rows * 4 * (2 * dim + heads + dim + 2 * dim // 2)
    assert kept_bytes(Execution("none"), rows) > rows * 4 * 10 * dim


def test_a_second_backward_is_refused():
    model = LongNet(model_config(), execution=Execution("selective"))
    loss = model(torch.zeros(1, 9, dtype=torch.int64), torch.zeros(1, 9, dtype=torch.int64)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can run once"):
        loss.backward()


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile without its slow last stage; counts the graphs that were made."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    _compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield counters
    _compiled.cache_clear()


@pytest.mark.parametrize("ffn", ["plain", "gated"])
def test_compiled_parts_compute_the_same(graphs, ffn):
    """One graph for each part and shape, not for each block: four of a block, four of its weights, two of the loss."""
    compiled = Execution("selective", tile=10, compile=True)
    assert_same(gradients(compiled, 30, 1, ffn=ffn), gradients(Execution(), 30, 1, ffn=ffn))
    assert graphs["stats"]["unique_graphs"] == 10
    gradients(compiled, 60, 1, ffn=ffn)  # nor for each length, nor for each place in a sequence
    gradients(compiled, 60, 1, chunk=30, ffn=ffn)
    assert graphs["stats"]["unique_graphs"] == 10
    assert not graphs["graph_break"]


def test_an_evaluation_is_not_compiled(graphs):
    model = LongNet(model_config(), execution=Execution(compile=True)).eval()
    with torch.no_grad():
        model(torch.zeros(1, 9, dtype=torch.int64), torch.zeros(1, 9, dtype=torch.int64))
    assert graphs["stats"]["unique_graphs"] == 0


def test_a_streamed_evaluation_is_compiled_once_for_all_chunks(graphs):
    model = LongNet(model_config(), execution=Execution("selective", tile=10, compile=True)).eval()
    plain = LongNet(model_config()).eval()
    plain.load_state_dict(model.state_dict())
    tokens = torch.arange(60)[None] % 7
    with torch.no_grad():
        expected = plain(tokens, tokens).loss_sum
        stream, total = model.stream(60), torch.zeros(())
        for shards in stream.forward(20):
            rows = slice(*shards.window(0))
            total = total + model(tokens[:, rows], tokens[:, rows], stream=stream).loss_sum
    assert abs(total - expected) < 1e-4 * expected
    assert graphs["stats"]["unique_graphs"] == 3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # which torch's compiler reads
@pytest.mark.parametrize("ffn", ["plain", "gated"])
def test_blocks_without_checkpointing_compile_too(graphs, ffn):
    assert_same(gradients(Execution(compile=True), 30, 1, ffn=ffn), gradients(Execution(), 30, 1, ffn=ffn))
    assert graphs["stats"]["unique_graphs"] == 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.?torch.jit.script_method:DeprecationWarning")  # of torch's compiler itself
def test_a_compiled_part_to_machine_code():
    torch.manual_seed(0)
    block = LongNet(model_config()).double().blocks[0]
    results = []
    for compile in (False, True):
        parts = RowParts(dict(block.named_parameters()), None, 4, 1e-5, compile=compile)
        x, out = torch.ones(10, 16, dtype=torch.float64), torch.ones(10, 4, 4, dtype=torch.float64)
        results.append(parts.output(x, out)[0])
    assert_same(*results)
