import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from longnet_dist.config.model import named_model
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.inference.decoder import Decoder
from longnet_dist.inference.generation import Sampling, generate
from longnet_dist.model.longnet import LongNet
from longnet_dist.serving.batcher import Batcher

fastapi = pytest.importorskip("fastapi")
pytest.importorskip("httpx")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LongNet(named_model("tiny")).eval()
    with torch.no_grad():  # draws letters, and byte 0, the separator, hardly ever
        model.head.weight[:] *= 8
    return model


@pytest.fixture(scope="module")
def client(model):
    from fastapi.testclient import TestClient

    from longnet_dist.serving.app import application

    with TestClient(application(Batcher(Decoder(model, 4, 300)), ByteTokenizer(), "tiny")) as client:
        yield client


def text_of(model, prompt, num_tokens, sampling):
    ids = [step[0] for step in generate(model, [list(prompt.encode())], num_tokens, sampling)]
    ids = ids[: ids.index(0)] if 0 in ids else ids
    return bytes(ids).decode("utf-8", errors="replace")


def post(client, **body):
    return client.post("/v1/completions", json=body)


def test_a_completion_is_what_the_model_draws(client, model):
    answer = post(client, prompt="def ", max_tokens=30, temperature=0).json()
    (choice,) = answer["choices"]
    assert choice["text"] == text_of(model, "def ", 30, Sampling(0.0))
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert answer["usage"]["prompt_tokens"] == 4
    assert 0 < answer["usage"]["completion_tokens"] <= 30
    seeded = post(client, prompt="def ", max_tokens=30, seed=5, model="tiny").json()["choices"][0]
    assert seeded["text"] == text_of(model, "def ", 30, Sampling(1.0, 0, 5))


def test_several_prompts_and_texts_stand_next_to_each_other(client):
    body = {"prompt": ["ab", "xyz"], "n": 2, "max_tokens": 12, "seed": 3, "echo": True}
    texts = [choice["text"] for choice in post(client, **body).json()["choices"]]
    assert [text[:2] for text in texts] == ["ab", "ab", "xy", "xy"]
    assert len(set(texts)) == 4
    assert texts == [choice["text"] for choice in post(client, **body).json()["choices"]]


def test_ids_are_prompts_too(client):
    written = post(client, prompt="abc", max_tokens=5, temperature=0).json()["choices"][0]["text"]
    for prompt in ([97, 98, 99], [[97, 98, 99]]):
        assert post(client, prompt=prompt, max_tokens=5, temperature=0).json()["choices"][0]["text"] == written


def test_a_stream_sends_the_same_text_in_pieces(client):
    body = {"prompt": "import", "max_tokens": 40, "seed": 1}
    whole = post(client, **body).json()["choices"][0]
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert [choice["finish_reason"] for choice in choices][-1] == whole["finish_reason"]
    assert len(choices) > 5


def test_a_stop_string_ends_a_text(client):
    body = {"prompt": "import", "max_tokens": 40, "seed": 1}
    whole = post(client, **body).json()["choices"][0]["text"]
    stop = whole[6:8]
    choice = post(client, **body, stop=[stop, "never"]).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_requests_at_the_same_time_get_their_own_text(client):
    bodies = [{"prompt": "x" * (1 + number), "max_tokens": 20, "seed": number} for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda body: post(client, **body).json()["choices"][0]["text"], bodies))
    assert together == [post(client, **body).json()["choices"][0]["text"] for body in bodies]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt is empty"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1000}, 400, "can have 300 tokens"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p"),
        ({"prompt": "a", "stop": list("abcde")}, 400, "at most 4"),
        ({"prompt": "a", "best_of": 3}, 400, "best_of is not offered"),
        ({"prompt": [5000]}, 400, "5000"),
        ({"prompt": "a", "model": "other"}, 404, "the model is tiny"),
    ],
)
def test_mistakes_are_answered_with_one_message(client, body, status, message):
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_fields_at_which_nothing_happens_are_taken(client):
    fields = {"best_of": 1, "logit_bias": {}, "logprobs": None, "presence_penalty": 0, "user": "x"}
    assert post(client, prompt="a", max_tokens=1, **fields).status_code == 200


def test_health_and_models(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
