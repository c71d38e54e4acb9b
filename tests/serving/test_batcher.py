import threading

import pytest
import torch

from longnet_dist.config.model import named_model
from longnet_dist.errors import ConfigError
from longnet_dist.inference.decoder import Decoder
from longnet_dist.inference.generation import Sampling, generate
from longnet_dist.model.longnet import LongNet
from longnet_dist.serving.batcher import Batcher

SEGMENTS = {"segment_lengths": (16, 48), "dilation_rates": (1, 3)}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LongNet(named_model("tiny", vocab_size=97, **SEGMENTS)).double().eval()


@pytest.fixture
def batcher(model):
    batcher = Batcher(Decoder(model, 3, 200))
    yield batcher
    batcher.close()


def alone(model, prompt, num_tokens, sampling):
    return [ids[0] for ids in generate(model, [prompt], num_tokens, sampling)]


def test_every_text_is_what_it_is_alone_whatever_is_decoded_beside_it(model, batcher):
    """Ten texts of unequal lengths in three places: they join and leave in the middle of others' segments."""
    wanted = [
        ([number + 1] * (1 + 17 * number % 60), 5 + 13 * number % 40, Sampling(0.0 if number % 2 else 1.0, 0, number))
        for number in range(10)
    ]
    requests = [batcher.submit(*one) for one in wanted]
    found = [list(request) for request in requests]
    assert found == [alone(model, *one) for one in wanted]


def test_a_cancelled_text_frees_its_place(batcher):
    endless = [batcher.submit([1], 199, Sampling()) for _ in range(3)]
    waiting = batcher.submit([2], 3, Sampling())
    first = iter(endless[0])
    next(first)
    for request in endless:
        request.cancel()
    assert len(list(waiting)) == 3
    never = batcher.submit([2], 3, Sampling())
    never.cancel()
    assert len(list(batcher.submit([3], 2, Sampling()))) == 2


def test_what_cannot_be_decoded_is_refused_at_once(batcher):
    for prompt, number, message in (
        ([], 1, "is empty"),
        ([1], 0, "at least 1"),
        ([1] * 150, 51, "can have 200 tokens"),
        ([-1], 1, "0 to 96"),
        ([5, 97], 1, "are 5 to 97"),
    ):
        with pytest.raises(ConfigError, match=message):
            batcher.submit(prompt, number, Sampling())


def test_closing_ends_every_request(model):
    batcher = Batcher(Decoder(model, 1, 10_000))
    running, waiting = (batcher.submit([1], 9000, Sampling()) for _ in range(2))
    next(iter(running))
    batcher.close()
    assert len(list(running)) < 9000
    assert list(waiting) == []
    assert not batcher.open
    with pytest.raises(ConfigError, match="is closing"):
        batcher.submit([1], 1, Sampling())


def test_who_waits_hears_why_decoding_ended(model, monkeypatch):
    batcher = Batcher(Decoder(model, 1, 100))
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(batcher.decoder, "step", lambda: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        list(batcher.submit([1], 3, Sampling()))
    assert not batcher.open
