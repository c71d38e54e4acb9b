import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from longnet_dist.comm.mesh import Mesh, MeshShape
from longnet_dist.config.model import named_model
from longnet_dist.data.batches import Windows
from longnet_dist.data.token_file import TokenFile
from longnet_dist.errors import DataError
from longnet_dist.inference.evaluation import evaluate
from longnet_dist.model.longnet import LongNet
from tests.distributed import run_distributed
from tests.train.runs import CPU, make_trainer, tiny_config


def evaluate_fresh_model(path, length, num_tokens, data):
    torch.manual_seed(0)
    mesh = Mesh.build(MeshShape(data, dist.get_world_size() // data), timedelta(seconds=60))
    model = LongNet(named_model("tiny"), group=mesh.sequence_group)
    windows = Windows(TokenFile.open(path), "validation", length)
    try:
        return evaluate(model, windows, num_tokens, 2, mesh, CPU)
    except DataError as error:
        return error


def by_hand(path, length, num_tokens):
    torch.manual_seed(0)
    model = LongNet(named_model("tiny"))
    token_file = TokenFile.open(path)
    first, _ = token_file.split("validation")
    text = torch.from_numpy(token_file.tokens[first : first + num_tokens + 1].astype("int64"))
    losses = []
    for start in range(0, num_tokens, length):
        stop = min(start + length, num_tokens)
        logits = model(text[None, start:stop]).logits[0]
        losses.append(F.cross_entropy(logits, text[start + 1 : stop + 1], reduction="none"))
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize(("world_size", "data"), [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)])
def test_every_mesh_gives_the_mean_over_the_same_tokens(corpus, world_size, data):
    results = run_distributed(evaluate_fresh_model, world_size, corpus, 50, 3 * 50 + 12, data)
    loss = by_hand(corpus, 50, 162)
    for result in results:
        assert result.tokens == 162
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        assert result.bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-5)  # bytes: one a token


def test_a_rest_that_ranks_cannot_share_evenly_is_cut(corpus):
    results = run_distributed(evaluate_fresh_model, 3, corpus, 50, 50 + 11, 1)
    assert {result.tokens for result in results} == {50 + 9}


def test_no_more_tokens_than_the_split_has(corpus):
    num_rows = Windows(TokenFile.open(corpus), "validation", 500).num_positions
    assert run_distributed(evaluate_fresh_model, 1, corpus, 500, 10**9, 1)[0].tokens == num_rows


def test_fewer_tokens_than_ranks_is_an_error_on_all(corpus):
    errors = run_distributed(evaluate_fresh_model, 3, corpus, 50, 2, 1)
    assert all("sequence ranks" in str(error) for error in errors)


def validate(config):
    trainer = make_trainer(config)
    return trainer._validate(trainer.validation), trainer.engine.module.training


@pytest.mark.parametrize("stage", [1, 3])
def test_validation_of_sharded_models(tmp_path, corpus, stage):
    """5 batches for 2 data ranks: one of them has none in the last round and takes part all the same."""
    settings = (
        f"deepspeed.zero_stage={stage}",
        "train.validate_every=1",
        f"train.validation_tokens={5 * 64}",
        "train.micro_batch_size=1",
    )
    (one, _), *_ = run_distributed(validate, 1, tiny_config(tmp_path / "one", corpus, *settings))
    for world_size in (2, 4):
        config = tiny_config(tmp_path / f"{world_size}", corpus, "parallel.data=2", *settings)
        for result, training in run_distributed(validate, world_size, config):
            assert training
            assert result["tokens"] == one["tokens"] == 320
            assert result["loss"] == pytest.approx(one["loss"], rel=1e-5)
