import pytest
import torch
import torch.distributed as dist

from longnet_dist import LongNet, LongNetConfig
from tests.distributed import run_distributed

ROWS = 75


def build(group=None, **fields):
    """A model in float64 whose branches are aligned with nothing."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 19, "dim": 16, "layers": 3, "heads": 4, "loss_chunk": 7}
    pattern = {"segment_lengths": [8, 20, 64], "dilation_rates": [1, 3, 8]}
    return LongNet(LongNetConfig(**(sizes | pattern | fields)), group=group).double()


def text():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(19, (2, ROWS + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[:, ::5] = -100
    return tokens[:, :-1], labels


def whole_step(**fields):
    """Loss sum, logits and gradients of the sequence in one piece."""
    model = build(**fields)
    tokens, labels = text()
    output = model(tokens, labels)
    output.loss_sum.backward()
    return output.loss_sum.detach(), model(tokens).logits.detach(), [p.grad for p in model.parameters()]


def streamed_step(chunk, fields):
    """The same in chunks, over all ranks of the world; this rank's rows of the logits."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    model = build(dist.group.WORLD if ranks > 1 else None, **fields)
    tokens, labels = text()

    def rows(shards):
        return slice(*shards.window(rank))

    total, logits, live = 0.0, [], model.stream(ROWS)
    with torch.no_grad():
        for shards in live.forward(chunk):
            logits.append((rows(shards), model(tokens[:, rows(shards)], stream=live).logits))
        live = model.stream(ROWS)
        for shards in live.record(chunk):
            model(tokens[:, rows(shards)], labels[:, rows(shards)], stream=live)
    for shards in live.replay(chunk):
        loss_sum = model(tokens[:, rows(shards)], labels[:, rows(shards)], stream=live).loss_sum
        loss_sum.backward()
        total += loss_sum.detach()
    gradients = [p.grad for p in model.parameters()]
    if ranks > 1:
        dist.all_reduce(total)
        for gradient in gradients:
            dist.all_reduce(gradient)
    return total, logits, gradients


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kv_heads": 2, "positions": "rope", "head_offsets": "blocked", "sinks": True},
        {"layer_offsets": True, "layer_shift": True},
    ],
    ids=["mha", "gqa", "layers differ"],
)
@pytest.mark.parametrize(("ranks", "chunk"), [(1, 75), (1, 64), (1, 9), (1, 1), (2, 25), (2, 32), (3, 14), (3, 36)])
def test_a_stream_has_the_loss_logits_and_gradients_of_the_whole(ranks, chunk, fields):
    loss, logits, gradients = whole_step(**fields)
    for total, parts, found in run_distributed(streamed_step, ranks, chunk, fields):
        torch.testing.assert_close(total, loss, rtol=1e-9, atol=0)
        for rows, part in parts:
            torch.testing.assert_close(part, logits[:, rows], rtol=0, atol=1e-9)
        for actual, wanted in zip(found, gradients, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9)
