"""Tokenizers survive the round trip and the rebuild from JSON; long documents are cut."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from longnet_dist.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, split_at_lines, tokenizer_from_json
from longnet_dist.errors import DataError

TEXT = "def f(x):\n    return 'naïve – 東京'  # </s> <|endoftext|>\n".encode()


@pytest.fixture
def hugging_face(tokenizer_json: Path) -> Tokenizer:
    return load_tokenizer(str(tokenizer_json))


@pytest.fixture
def tiktoken_bytes(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """Return an encoding of the 256 bytes and two words, in place of those that tiktoken downloads."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([value]): value for value in range(256)} | {b"de": 256, b"def": 257}
    encoding = tiktoken.Encoding(
        "tiny", pat_str=r"\s+|\S+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"tiny": encoding}.__getitem__)
    return load_tokenizer("tiktoken:tiny")


@pytest.fixture(params=["bytes", "hugging_face", "tiktoken_bytes"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue(request.param)


def test_decode_gives_back_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([]) == b""
    assert len(tokenizer.encode(b"")) == 0


def test_text_never_becomes_a_separator(tokenizer: Tokenizer) -> None:
    assert tokenizer.document_separator is not None
    assert tokenizer.document_separator not in tokenizer.encode(TEXT)


def test_json_rebuilds_the_tokenizer(tokenizer: Tokenizer) -> None:
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert (again.name, again.vocab_size, again.document_separator) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.document_separator,
    )
    np.testing.assert_array_equal(again.encode(TEXT), tokenizer.encode(TEXT))


def test_decode_refuses_a_foreign_id(tokenizer: Tokenizer) -> None:
    for foreign in (-1, tokenizer.vocab_size):
        with pytest.raises(DataError, match=rf"not {foreign}"):
            tokenizer.decode([5, foreign])


def test_vocabularies_merge(hugging_face: Tokenizer, tiktoken_bytes: Tokenizer) -> None:
    assert list(tiktoken_bytes.encode(b"def")) == [257]
    assert len(hugging_face.encode(TEXT)) < len(TEXT)


def test_truncation_of_a_tokenizer_json_drops_no_text(tokenizer_json: Path) -> None:
    content = json.loads(tokenizer_json.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    assert (
        tokenizer_from_json({"kind": "huggingface", "name": "t", "content": content}).decode(
            tokenizer_from_json({"kind": "huggingface", "name": "t", "content": content}).encode(TEXT)
        )
        == TEXT
    )


@pytest.mark.parametrize("spec", ["word", "no/such/tokenizer.json", "tiktoken:nonsense"])
def test_unknown_tokenizer(spec: str) -> None:
    if spec.startswith("tiktoken"):
        pytest.importorskip("tiktoken")
    with pytest.raises(DataError, match=r"tokenizer|encoding"):
        load_tokenizer(spec)


@pytest.mark.parametrize("content", ["not json", "{}", "[1]"])
def test_damaged_tokenizer_json(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(str(path))


@pytest.mark.parametrize(
    "fields", [{}, {"kind": "words"}, {"kind": "huggingface"}, {"kind": "tiktoken", "encoding": 3}]
)
def test_unknown_tokenizer_fields(fields: dict[str, object]) -> None:
    with pytest.raises(DataError, match="kind"):
        tokenizer_from_json(fields)


@pytest.mark.parametrize("limit", [4, 7, 64])
def test_pieces_join_to_the_document_and_keep_characters_whole(limit: int) -> None:
    draw = random.Random(limit)
    text = "".join(draw.choices("ab é東𝄞\n", k=500)).encode()
    cuts = sorted(draw.sample(range(len(text)), 20))
    chunks = [text[first:last] for first, last in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    pieces = list(split_at_lines(chunks, limit))
    assert b"".join(pieces) == text
    for piece in pieces:
        assert 0 < len(piece) <= limit
        piece.decode("utf-8")


def test_pieces_end_at_lines_then_before_spaces() -> None:
    assert list(split_at_lines([b"one\ntwo\nthree four"], 10)) == [b"one\ntwo\n", b"three four"]
    assert list(split_at_lines([b"three four five"], 12)) == [b"three four", b" five"]
    assert list(split_at_lines([b"\x80" * 9], 4)) == [b"\x80" * 4, b"\x80" * 4, b"\x80"]
