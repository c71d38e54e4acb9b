"""What tokens stand for is counted with every kind of tokenizer, and prompts and draws fit tokenizer and model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longnet_dist.data.corpus import find_corpus
from longnet_dist.data.prepare import prepare
from longnet_dist.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    encode_prompt,
    ids_with_text,
    load_tokenizer,
)
from longnet_dist.errors import ConfigError, DataError

tokenizers = pytest.importorskip("tokenizers")
TEXTS = ["hello world. hello there, hello 3 worlds", "größe 😀 und Wörter\n", "a  b"]


def huggingface(backend: Any) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(json.loads(backend.to_str()), "test")


def trained(model: Any, trainer: Any, pre_tokenizer: Any, decoder: Any) -> HuggingFaceTokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.train_from_iterator(TEXTS * 3, trainer)
    if decoder is not None:
        backend.decoder = decoder
    return huggingface(backend)


def word_piece() -> HuggingFaceTokenizer:
    models, trainers = tokenizers.models, tokenizers.trainers
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    model = models.WordPiece(unk_token="[UNK]")
    decoder = tokenizers.decoders.WordPiece(cleanup=False)
    return trained(model, trainer, tokenizers.pre_tokenizers.Whitespace(), decoder)


def metaspace() -> HuggingFaceTokenizer:
    models, trainers = tokenizers.models, tokenizers.trainers
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["</s>"], show_progress=False)
    space = tokenizers.pre_tokenizers.Metaspace()
    return trained(models.BPE(), trainer, space, tokenizers.decoders.Metaspace())


def byte_fallback() -> HuggingFaceTokenizer:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"ab": 256}
    decoders = tokenizers.decoders
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return huggingface(backend)


def dropping() -> HuggingFaceTokenizer:
    """A vocabulary of a few letters, without a token for what is unknown."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, ".": 7}, [("a", "b")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return huggingface(backend)


def test_byte_level_tokens_stand_for_the_whole_text(tokenizer_json: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_json))
    for text in TEXTS:
        assert tokenizer.token_bytes()[tokenizer.encode(text.encode())].sum() == len(text.encode())
    assert tokenizer.token_bytes()[tokenizer.document_separator] == 1


@pytest.mark.parametrize("make", [word_piece, metaspace])
def test_words_stand_for_what_they_decode_to(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer.encode(TEXTS[0].encode())
    counted, decoded = tokenizer.token_bytes()[ids].sum(), len(tokenizer.decode(ids))
    assert abs(int(counted) - decoded) <= 1  # a decoder drops the space before the first word


def test_bytes_of_a_fallback_are_bytes() -> None:
    tokenizer = byte_fallback()
    ids = tokenizer.encode("größe ab".encode())
    assert tokenizer.token_bytes()[ids].sum() == len("größe ab".encode())
    assert tokenizer.token_bytes()[256] == 2


def test_dropped_text_is_counted_and_said(tmp_path: Path) -> None:
    text = "ab.\nä😀zz ab. " * 100
    (tmp_path / "text").write_text(text)
    prepared = prepare(find_corpus([tmp_path / "text"]), tmp_path / "a.tokens", dropping())
    assert prepared.header.num_bytes == 2 * 3 * 100
    assert (prepared.num_read, prepared.num_lost) == (len(text.encode()), len(text.encode()) - 600)
    assert prepared.summary().endswith(
        f"{prepared.num_lost:,} of {prepared.num_read:,} bytes (64.7%) dropped by the tokenizer"
    )
    for workers in (2,):
        again = prepare(find_corpus([tmp_path / "text"]), tmp_path / "b.tokens", dropping(), num_workers=workers)
        assert (again.num_lost, again.path.read_bytes()) == (prepared.num_lost, prepared.path.read_bytes())


def test_unused_ids_are_never_drawn() -> None:
    allowed = ids_with_text(dropping(), 12)
    assert np.flatnonzero(allowed).tolist() == [0, 1, 2, 7]
    assert ids_with_text(ByteTokenizer(), 300).sum() == 256
    assert ids_with_text(dropping(), 2).tolist() == [True, True]


@pytest.mark.parametrize(
    ("prompt", "vocab_size", "message"),
    [
        ("", 256, "prompt is empty"),
        ("xyz ä", 256, r"'xyz ä' has no token of the tokenizer test; give another prompt"),
        ("ab.", 4, r"token id 7 of the tokenizer test, .* ends at 3; .* model\.vocab_size=8"),
    ],
)
def test_a_prompt_that_does_not_fit(prompt: str, vocab_size: int, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        encode_prompt(dropping(), prompt.encode(), vocab_size)


def test_a_prompt_that_fits() -> None:
    assert encode_prompt(dropping(), b"ab.", 8) == [2, 7]
    assert encode_prompt(ByteTokenizer(), b"caf\xe9", 256) == list(b"caf\xe9")


def test_a_tokenizer_that_refuses_a_text() -> None:
    tokenizer = huggingface(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]")))
    with pytest.raises(DataError, match=r"tokenizer test cannot encode a text: .*use another tokenizer"):
        tokenizer.encode(b"b")
