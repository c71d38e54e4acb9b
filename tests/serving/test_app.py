import json
import socket
import threading
import time
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
        ({"prompt": "a", "suffix": "b"}, 400, "suffix is not offered"),
        ({"prompt": "a", "max_token": 3}, 400, "there is no field max_token; the nearest is max_tokens"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "use stream=true"),
        ({"prompt": "a", "stream": True, "stream_options": {"usage": 1}}, 400, "stream_options.usage"),
        ({"prompt": []}, 400, "no prompt in the list"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": [1, "a"]}, 400, "prompt must be a text, a list of texts, a list of ids"),
        ({"prompt": "a", "stop": 3}, 400, "stop must be a text or up to four"),
        ([], 400, "the body must be a JSON object"),
        ({"prompt": [5000]}, 400, "5000"),
        ({"prompt": "a", "model": "other"}, 404, "the model is tiny"),
    ],
)
def test_mistakes_are_answered_with_one_message(client, body, status, message):
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "message"),
    [
        ("GET", "/v1/completions", b"", 405, "Method Not Allowed"),
        ("POST", "/v1/chat/completions", b"{}", 404, "Not Found"),
        ("POST", "/v1/completions", b'{"prompt"', 400, "it is no JSON"),
        ("POST", "/v1/completions", b'{"prompt": "\xff"}', 400, "parsing the body"),
        ("POST", "/v1/completions", b"", 400, "the body must be a JSON object"),
    ],
)
def test_every_refusal_has_the_body_of_an_error(client, method, path, content, status, message):
    answer = client.request(method, path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_a_stream_counts_its_tokens_if_asked(client):
    body = {"prompt": ["a", "bc"], "max_tokens": 5, "seed": 1}
    whole = post(client, **body).json()
    streamed = post(client, **body, stream=True, stream_options={"include_usage": True}).text.split("\n\n")
    events = [json.loads(event.removeprefix("data: ")) for event in streamed if event.startswith("data: {")]
    assert [event["usage"] for event in events] == [None] * (len(events) - 1) + [whole["usage"]]
    assert events[-1]["choices"] == []


def test_null_is_the_default(client):
    fields = dict.fromkeys(["max_tokens", "top_p", "n", "stop", "stream", "echo", "logprobs", "suffix", "best_of"])
    whole = post(client, prompt="a", seed=1, temperature=1.0).json()["choices"]
    assert post(client, prompt="a", seed=1, temperature=1.0, **fields).json()["choices"] == whole


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_place(model, stream):
    uvicorn = pytest.importorskip("uvicorn")

    from longnet_dist.serving.app import application

    batcher = Batcher(Decoder(model, 1, 500_000))
    server = uvicorn.Server(uvicorn.Config(application(batcher, ByteTokenizer(), "tiny"), log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            body = json.dumps({"prompt": "a", "max_tokens": 400_000, "temperature": 0, "stream": stream}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
            # The second waits for the place of the first.
            clients = [socket.create_connection(listening.getsockname()) for _ in range(2)]
            for one in clients:
                one.sendall(request)
                wait_for(lambda: len(batcher._active) == 1)
            wait_for(lambda: len(batcher._waiting) == 1)
            clients[1].close()
            wait_for(lambda: batcher._waiting[0].cancelled)
            clients[0].close()
            wait_for(lambda: not batcher._active)
        finally:
            server.should_exit = server.force_exit = True
            batcher.close()
            thread.join()


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_fields_at_which_nothing_happens_are_taken(client):
    fields = {"best_of": 1, "logit_bias": {}, "logprobs": None, "presence_penalty": 0, "user": "x", "suffix": ""}
    assert post(client, prompt="a", max_tokens=1, **fields).status_code == 200


def test_health_and_models(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
