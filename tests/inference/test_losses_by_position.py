"""Losses of parts of a sequence are those of a forward with the labels of the part."""

import math
from itertools import pairwise

import pytest
import torch

from longnet_dist import LongNet, LongNetConfig
from longnet_dist.data.batches import Windows
from longnet_dist.data.tasks import make_sample
from longnet_dist.data.token_file import TokenFile
from longnet_dist.data.token_file_writer import TokenFileWriter
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.errors import ConfigError, DataError
from longnet_dist.inference.losses_by_position import losses_after_prompts, losses_by_position
from longnet_dist.inference.retrieval import SEED, Retrieval, evaluate_retrieval, grid_of

CPU = torch.device("cpu")


def model(**fields):
    settings = {"dim": 32, "layers": 2, "heads": 4, "segment_lengths": [32, 128], "dilation_rates": [1, 2]}
    torch.manual_seed(0)
    return LongNet(LongNetConfig(**settings | {"positions": "rope"} | fields)).double().eval()


@pytest.fixture
def windows(tmp_path):
    with TokenFileWriter(tmp_path / "text.tokens", ByteTokenizer(), validation=0.5) as writer:
        writer.add_document([bytes(32 + hash_ % 90 for hash_ in (n * n * 7919 % 1009 for n in range(2000)))])
    return Windows(TokenFile.open(tmp_path / "text.tokens"), "validation", 256)


@pytest.mark.parametrize("kind", ["dilated", "sparse"])
def test_parts_of_a_window(kind, windows):
    one, edges = model(attention=kind), [0, 1, 64, 200, 256]
    found = losses_by_position(one, windows, edges, 2, CPU)
    for part, (start, stop) in enumerate(pairwise(edges)):
        losses = []
        for index in range(2):
            tokens, labels = windows.local([index])
            logits = one(tokens).logits[0, start:stop]
            losses.append(torch.nn.functional.cross_entropy(logits, labels[0, start:stop], reduction="none"))
        assert found[part] == pytest.approx(torch.cat(losses).mean().item())
    with pytest.raises(DataError, match="shorter windows"):
        losses_by_position(one, Windows(windows.token_file, "validation", 5000), edges, 2, CPU)


@pytest.mark.parametrize("kind", ["dilated", "full", "window"])
def test_the_same_tokens_behind_prompts(kind, windows):
    one, prompts, asked = model(attention=kind), [1, 50, 200], 40
    found = losses_after_prompts(one, windows, prompts, asked, 3, CPU)
    for number, prompt in enumerate(prompts):
        losses = []
        for index in range(3):
            tokens, labels = windows.local([index])
            text = torch.cat([tokens[0], labels[0, -1:]])
            given = text[-asked - prompt :]
            logits = one(given[None, :-1]).logits[0, prompt - 1 :]
            losses.append(torch.nn.functional.cross_entropy(logits, text[-asked:]).item())
        assert found[number] == pytest.approx(sum(losses) / 3)
    with pytest.raises(DataError, match="shorter prompts"):
        losses_after_prompts(one, windows, [250], asked, 3, CPU)


def test_retrieval_counts_what_a_model_predicts():
    for kind, chunk in (("dilated", 50), ("sparse", 50), ("dilated", 1000)):
        one = model(attention=kind)
        result = evaluate_retrieval(one, "passkey", 300, 0.5, 3, chunk, CPU)
        assert (result.samples, result.solved, result.task) == (3, 0, "passkey")
        # A head that always says "7" gets the sevens of all keys.
        with torch.no_grad():
            one.norm.weight.zero_()
            one.norm.bias.fill_(1.0)
            one.head.weight.zero_()
            one.head.weight[ord("7")] = 1.0
        result = evaluate_retrieval(one, "passkey", 300, 0.5, 20, chunk, CPU)
        sevens = sum(make_sample("passkey", SEED, number, 300, 0.5).text[-5:].count(b"7") for number in range(20))
        assert result.tokens_right == pytest.approx(sevens / 100)
    with pytest.raises(ConfigError, match="causal model"):
        evaluate_retrieval(model(causal=False), "passkey", 300, 0.5, 1, 100, CPU)


def test_the_grid_of_a_task():
    results = [Retrieval("copy", length, depth, 4, length // 100, 0.5) for depth in (1.0, 0.0) for length in (200, 100)]
    lengths, depths, grid = grid_of([*results[:3]])
    assert (lengths, depths) == ([100, 200], [0.0, 1.0])
    assert grid[1] == [0.25, 0.5]
    assert math.isnan(grid[0][0])
    assert grid[0][1] == 0.5
