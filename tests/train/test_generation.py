import pytest
import torch

from longnet_dist.config.model import named_model
from longnet_dist.errors import ConfigError
from longnet_dist.model.longnet import LongNet
from longnet_dist.train.generation import Sampling, generate

PROMPT = [10, 20, 30]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LongNet(named_model("tiny")).eval()


def test_greedy_takes_the_likeliest_token_of_the_whole_context(model):
    ids = list(PROMPT)
    for token in generate(model, PROMPT, 5, 100, GREEDY):
        assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    assert len(ids) == 8


def test_only_the_context_is_seen(model):
    a = list(generate(model, [1, 2, 3, *PROMPT], 4, 3, GREEDY))
    b = list(generate(model, [9, 8, 7, *PROMPT], 4, 3, GREEDY))
    assert a == b
    assert a != list(generate(model, [9, 8, 7, *PROMPT], 4, 6, GREEDY))


def test_draws_follow_the_seed(model):
    draws = [list(generate(model, PROMPT, 20, 100, Sampling(1.0, 0, seed))) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_top_k_leaves_the_k_likeliest(model):
    likeliest = set(model(torch.tensor([PROMPT])).logits[0, -1].topk(3).indices.tolist())
    drawn = {next(generate(model, PROMPT, 1, 100, Sampling(5.0, 3, seed))) for seed in range(60)}
    assert drawn == likeliest


def test_a_low_temperature_is_nearly_greedy(model):
    assert list(generate(model, PROMPT, 5, 100, Sampling(1e-4, 0))) == list(generate(model, PROMPT, 5, 100, GREEDY))


def test_a_top_k_beyond_the_vocabulary_is_all_of_it(model):
    assert list(generate(model, PROMPT, 5, 9, Sampling(1.0, 9999))) == list(
        generate(model, PROMPT, 5, 9, Sampling(1.0, 0))
    )


def test_a_prompt_must_hold_something(model):
    with pytest.raises(ConfigError, match="prompt is empty"):
        next(generate(model, [], 1, 100, GREEDY))


def test_an_encoder_cannot_continue():
    encoder = LongNet(named_model("tiny", causal=False))
    with pytest.raises(ConfigError, match=r"model\.causal=false"):
        next(generate(encoder, PROMPT, 1, 100, GREEDY))


@pytest.mark.parametrize("fields", [{"temperature": -1}, {"top_k": -1}, {"seed": -1}])
def test_negative_settings_are_refused(fields):
    with pytest.raises(ConfigError, match="must not be negative"):
        Sampling(**fields)
