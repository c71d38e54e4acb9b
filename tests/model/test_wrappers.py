"""LongNet in torch's own wrappers and a plain training loop, without this package's trainer."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from longnet_dist.engine.execution import Execution
from longnet_dist.model.longnet import LongNet
from tests.distributed import run_distributed
from tests.engine.test_block_run import model_config

EXECUTIONS = {"plain": None, "engine": Execution("selective", tile=7)}
STEPS, ROWS = 3, 31


def make(execution, **fields):
    torch.manual_seed(0)
    return LongNet(model_config(**fields), execution=execution).double()


def batch(step, number):
    """The sequence of a data rank in a step."""
    generator = torch.Generator().manual_seed(10 * step + number)
    return torch.randint(256, (1, ROWS), generator=generator)


def train(model, sequences):
    """Mean losses of plain steps of SGD; ``sequences`` of a step, one behind the other in a batch."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(STEPS):
        tokens = torch.cat([batch(step, number) for number in sequences])
        loss = model(tokens, tokens.roll(-1, 1)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wrapped(kind, name, fields):
    rank, model = torch.distributed.get_rank(), make(EXECUTIONS[name], **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its collectives
        if kind == "ddp":
            trained = DistributedDataParallel(model)
        else:
            for block in model.blocks if kind == "fsdp of blocks" else ():
                fully_shard(block)
            trained = fully_shard(model)
        losses = train(trained, [rank])
        weights = {key: whole(value.detach()) for key, value in model.state_dict().items()}
    return losses, weights


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("name", EXECUTIONS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp of blocks"])
def test_a_wrapped_model_trains_like_one_process(kind, name, fields):
    """Two data ranks with a sequence each give the weights of one process with both."""
    results = run_distributed(wrapped, 2, kind, name, fields)
    alone = make(None, **fields)
    losses = train(alone, [0, 1])
    for step in range(STEPS):
        assert sum(result[0][step] for result in results) / 2 == pytest.approx(losses[step], rel=1e-9)
    for _, weights in results:
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(weights[key], value, rtol=1e-9, atol=1e-11)


def test_a_block_is_copied_and_pickled_with_its_engine(tmp_path):
    """A model with an engine is an ordinary module: a deep copy trains on, a saved state loads."""
    from copy import deepcopy

    model = make(Execution("selective", offload=True))
    copied = deepcopy(model)
    assert isinstance(copied.blocks[0], nn.Module)
    assert train(copied, [0]) == train(model, [0])
