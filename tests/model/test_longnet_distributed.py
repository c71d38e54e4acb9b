import pytest
import torch
import torch.distributed as dist

from longnet_dist.config.model import named_model
from longnet_dist.geometry.window import Shards
from longnet_dist.model.longnet import LongNet
from tests.distributed import run_distributed

FIELDS = {"dim": 16, "heads": 4, "vocab_size": 20, "segment_lengths": [8, 12, 64], "dilation_rates": [1, 3, 4]}
VARIANTS = [
    {"kv_heads": 2, "xpos_base": 64},
    {"positions": "rope", "qk_norm": True, "tie_embeddings": True, "loss_chunk": 5},
    {"causal": False},
    {"layers": 3, "layer_offsets": True, "layer_shift": True, "xpos_base": 64, "sinks": True},
]


def problem(fields, group):
    torch.manual_seed(0)
    network = LongNet(named_model("tiny", **(FIELDS | fields)), group=group).double()
    tokens = torch.randint(20, (2, 48))
    labels = tokens[:, 1:].clone()
    labels[:, ::5] = -100
    return network, tokens[:, :-1], labels


def worst_error(fields, give_total):
    """Largest difference of summed loss, label count and gradients from the same model on one rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    alone, tokens, labels = problem(fields, None)
    expected = alone(tokens, labels)
    expected.loss.backward()

    network, _, _ = problem(fields, dist.group.WORLD)
    shards = Shards.even(tokens.shape[1], ranks)
    start, stop = shards.window(rank)
    rows = {"start": start, "total_rows": shards.total_rows} if give_total else {}
    out = network(tokens[:, start:stop], labels[:, start:stop], **rows)
    totals = torch.stack((out.loss_sum.detach(), out.num_labels.double()))
    dist.all_reduce(totals)
    (out.loss_sum / totals[1]).backward()
    errors = [(totals[0] / totals[1] - expected.loss).abs(), (totals[1] - expected.num_labels).abs()]
    for parameter, exact in zip(network.parameters(), alone.parameters(), strict=True):
        dist.all_reduce(parameter.grad)
        errors.append((parameter.grad - exact.grad).abs().max())
    return max(error.item() for error in errors)


@pytest.mark.parametrize("fields", VARIANTS)
@pytest.mark.parametrize("ranks", [2, 3, 4])  # 47 rows: the last rank holds fewer
def test_loss_and_gradients_are_those_of_one_rank(fields, ranks):
    assert max(run_distributed(worst_error, ranks, fields, ranks != 2)) < 1e-9


def wrong_start():
    network, tokens, _ = problem({}, dist.group.WORLD)
    try:
        network(tokens[:, :10], start=7, total_rows=20)
    except ValueError as error:
        return str(error)
    return None


def test_a_start_that_is_not_the_ranks_own_is_refused():
    for first_row, message in zip((0, 10), run_distributed(wrong_start, 2, timeout_seconds=20), strict=True):
        assert f"begin at global row {first_row} of its group, but start is 7" in message
