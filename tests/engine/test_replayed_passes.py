import pytest
import torch

from longnet_dist.config.model import named_model
from longnet_dist.engine.execution import Execution
from longnet_dist.engine.replayed_passes import MOST_GRAPHS, ReplayedPasses
from longnet_dist.model.longnet import LongNet

DEVICES = [
    ("cpu", torch.float64, Execution()),
    ("cpu", torch.float64, Execution("selective", tile=40)),
    pytest.param(
        ("cuda", torch.bfloat16, Execution("selective", compile=True)),
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
SIZES = {"dim": 128, "heads": 2, "vocab_size": 20, "segment_lengths": [32, 128], "dilation_rates": [1, 2]}


def model_of(device, dtype, execution, **fields):
    torch.manual_seed(0)
    return LongNet(named_model("tiny", **(SIZES | fields)), execution=execution).to(device, dtype).train()


def batch(device, rows=200, seed=0, texts=2):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, (texts, rows + 1), generator=generator).to(device)
    labels = tokens[:, 1:].clone()
    labels[:, seed :: seed + 3] = -100
    return tokens[:, :-1], labels


def one_pass(model, tokens, labels, cu_seqlens=None):
    """Loss and gradients of a sequence in one chunk."""
    rows = tokens.shape[1]
    stream = model.stream(rows, cu_seqlens)
    assert not list(stream.record(rows))
    model.zero_grad()
    for _ in stream.replay(rows):
        out = model(tokens, labels, stream=stream)
        out.loss.backward()
    return out.loss.detach(), out.num_labels, [parameter.grad for parameter in model.parameters()]


def close(found, expected, dtype):
    tolerance = {"rtol": 0, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.05, "atol": 1e-3}
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, **tolerance)


@pytest.mark.parametrize("kind", DEVICES, ids=lambda kind: f"{kind[0]}-{kind[2].checkpointing}")
@pytest.mark.parametrize("fields", [{}, {"positions": "xpos", "sinks": True, "tie_embeddings": True}], ids=["", "all"])
def test_replays_give_what_the_model_gives_while_weights_and_tokens_change(kind, fields):
    device, dtype, _ = kind
    plain, replayed = (model_of(*kind, **fields) for _ in range(2))
    ReplayedPasses.attach(replayed)
    for seed in range(3):
        given = batch(device, seed=seed)
        close(one_pass(replayed, *given), one_pass(plain, *given), dtype)
        replayed.eval()  # another length, for which the positions drop their tables
        with torch.no_grad():
            replayed(batch(device, 77)[0])
        replayed.train()
        with torch.no_grad():
            for model in (plain, replayed):
                for parameter in model.parameters():
                    parameter.mul_(0.9)
    assert len(replayed.forward._graphs) == 1


def test_what_cannot_be_replayed_is_computed():
    model = ReplayedPasses.attach(model_of(*DEVICES[0]))
    tokens, labels = batch("cpu")
    graphs = model.forward._graphs
    plain = model_of(*DEVICES[0])
    for cu_seqlens in ([0, 50, 200], None):
        close(one_pass(model, tokens, labels, cu_seqlens), one_pass(plain, tokens, labels, cu_seqlens), torch.float64)
        assert len(graphs) == (cu_seqlens is None)
    assert model(tokens).logits.shape == (2, 200, 20)
    assert model(tokens, labels, hidden_states=True).hidden_states is not None
    stream = model.stream(200)
    for shards in stream.forward(100):
        model(tokens[:, shards.start : shards.stop], labels[:, shards.start : shards.stop], stream=stream)
    assert len(graphs) == 1


def test_batches_of_many_shapes_have_no_more_graphs_than_allowed():
    model, plain = ReplayedPasses.attach(model_of(*DEVICES[0])), model_of(*DEVICES[0])
    for rows in range(60, 61 + MOST_GRAPHS):
        close(one_pass(model, *batch("cpu", rows)), one_pass(plain, *batch("cpu", rows)), torch.float64)
    assert len(model.forward._graphs) == MOST_GRAPHS
