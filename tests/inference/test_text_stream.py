import random

import pytest

from longnet_dist.data.tokenizers import ByteTokenizer, load_tokenizer
from longnet_dist.inference.generation import TextStream
from tests.data.tiny_tokenizer import write_tiny_tokenizer

TEXT = "naïve café — 東京 🚀 def f(x):\n    return x\n"


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return ByteTokenizer()
    return load_tokenizer(str(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")))


def pieces_of(tokenizer, text, prompt="", stop=()):
    ids = tokenizer.encode(text.encode()).tolist()
    stream = TextStream(tokenizer, tokenizer.encode(prompt.encode()).tolist() if prompt else (), stop)
    pieces = [stream.push(number) for number in ids]
    return [*pieces, stream.finish()], stream


@pytest.mark.parametrize("prompt", ["", "x", "東京", TEXT])
def test_the_pieces_make_up_the_text_and_split_no_character(tokenizer, prompt):
    pieces, stream = pieces_of(tokenizer, TEXT, prompt)
    assert "".join(pieces) == TEXT
    assert len([piece for piece in pieces if piece]) > 10
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert not stream.stopped


@pytest.mark.parametrize("seed", range(20))
def test_nothing_from_a_stop_string_on_is_given_out(tokenizer, seed):
    """The first of several, however it is spread over ids."""
    draw = random.Random(seed)
    stop = []
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(TEXT) - 4)
        stop.append(TEXT[start : start + draw.randint(1, 4)])
    first = min(TEXT.index(text) for text in stop)
    pieces, stream = pieces_of(tokenizer, TEXT, "", stop)
    assert "".join(pieces) == TEXT[:first]
    assert stream.stopped


def test_a_stop_string_that_has_only_begun_is_text(tokenizer):
    pieces, stream = pieces_of(tokenizer, TEXT + "ret", "", ["return y", "retro"])
    assert "".join(pieces) == TEXT + "ret"
    assert not stream.stopped


def test_bytes_that_are_no_text_come_at_the_end():
    stream = TextStream(ByteTokenizer())
    assert [stream.push(0xC3), stream.push(0xA9)] == ["", "é"]
    assert [stream.push(0xC3), stream.finish()] == ["", "\N{REPLACEMENT CHARACTER}"]
    stream = TextStream(ByteTokenizer())
    assert [stream.push(0xFF), stream.push(65)] == ["", "\N{REPLACEMENT CHARACTER}A"]
