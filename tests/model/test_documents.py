"""Packed documents through a whole model, as plain modules and with the engine."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from longnet_dist.engine.execution import Execution
from longnet_dist.errors import ShapeError
from longnet_dist.model.longnet import LongNet
from tests.distributed import run_distributed
from tests.engine.test_block_run import EXECUTIONS, model_config

ROWS = 43
EDGES = [[0, 9, 10, 43], [2, 20, 41], [[0, 43], [5, 6, 30]]]


def make(execution=None, group=None, **fields):
    torch.manual_seed(0)
    return LongNet(model_config(**fields), group=group, execution=execution).double()


def batch(edges):
    """Tokens and labels of two items; the last token of a document, and padding, predict nothing."""
    tokens = torch.randint(256, (2, ROWS), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(tokens, -100)
    for item in range(2):
        own = edges[item] if isinstance(edges[0], list) else edges
        for start, stop in pairwise(own):
            labels[item, start : stop - 1] = tokens[item, start + 1 : stop]
    return tokens, labels


def results(model, edges):
    tokens, labels = batch(edges)
    loss = model(tokens, labels, cu_seqlens=edges).loss_sum
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def one_by_one(model, edges):
    """The loss sum and gradients of a plain loop over documents."""
    tokens, labels = batch(edges)
    total = torch.zeros((), dtype=torch.float64)
    for item in range(2):
        own = edges[item] if isinstance(edges[0], list) else edges
        for start, stop in pairwise(own):
            part = tokens[item : item + 1, start:stop], labels[item : item + 1, start:stop]
            loss = model(*part).loss_sum
            loss.backward()
            total += loss.detach()
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("fields", [{}, {"causal": False, "qk_norm": True}], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("edges", EDGES, ids=str)
@pytest.mark.parametrize("execution", [None, *EXECUTIONS[:4]], ids=str)
def test_a_batch_of_documents_is_a_loop_over_them(execution, edges, fields):
    assert_same(results(make(execution, **fields), edges), one_by_one(make(**fields), edges))


def on_ranks(edges, execution):
    model = make(execution, dist.group.WORLD)
    tokens, labels = batch(edges)
    rows = -(-ROWS // dist.get_world_size())
    part = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
    loss = model(tokens[:, part], labels[:, part], cu_seqlens=edges).loss_sum
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("execution", [None, Execution("selective", tile=7)], ids=str)
def test_over_ranks(ranks, execution):
    edges = EDGES[0]
    parts = run_distributed(on_ranks, ranks, edges, execution)
    loss, gradients = one_by_one(make(), edges)
    assert_same(sum(part[0] for part in parts), loss)
    for name, gradient in gradients.items():
        assert_same(sum(part[1][name] for part in parts), gradient)


@pytest.mark.parametrize("chunk", [10, 19])
def test_in_chunks(chunk):
    edges = EDGES[0]
    model, (tokens, labels) = make(Execution("selective")), batch(edges)
    stream, total = model.stream(ROWS, cu_seqlens=edges), torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for shards in stream.record(chunk):
            part = slice(*shards.window(0))
            model(tokens[:, part], labels[:, part], stream=stream)
    for shards in stream.replay(chunk):
        part = slice(*shards.window(0))
        loss = model(tokens[:, part], labels[:, part], stream=stream).loss_sum
        loss.backward()
        total += loss.detach()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same((total, gradients), one_by_one(make(), edges))


@pytest.mark.parametrize("edges", [EDGES[0], EDGES[2]], ids=str)
def test_a_token_changes_no_logit_of_another_document(edges):
    model, (tokens, _) = make().eval(), batch(edges)
    first = edges if not isinstance(edges[0], list) else edges[1]
    start, stop = first[1], first[2]
    changed = tokens.clone()
    changed[1, start] += 1
    with torch.no_grad():
        before, after = (model(x, cu_seqlens=edges).logits for x in (tokens, changed))
    assert before.shape == (2, ROWS, 256)
    moved = (before != after).any(-1)
    assert moved[1, start:stop].any()
    moved[1, start:stop] = False
    assert not moved.any()


def refusal():
    with pytest.raises(ShapeError, match="over ranks all batch items must have the same documents"):
        make(None, dist.group.WORLD)(torch.zeros(2, 22, dtype=torch.int64), cu_seqlens=[[0, 44], [0, 9, 44]])
    return True


def test_items_with_lists_of_their_own_are_refused_over_ranks():
    assert all(run_distributed(refusal, 2))
