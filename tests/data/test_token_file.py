"""An opened token file returns what was written; every kind of damage is reported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longnet_dist.data.token_file import PREAMBLE, TokenFile
from longnet_dist.data.token_file_writer import TokenFileWriter
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.errors import DataError

TEXT = bytes(range(1, 256)) * 40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "text.tokens"
    with TokenFileWriter(path, ByteTokenizer(), validation=0.25) as writer:
        writer.add_document([TEXT])
    return path


def change_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header, with correct lengths and checksum, as a faulty program could."""
    data = path.read_bytes()
    magic, version, header_bytes, _ = PREAMBLE.unpack(data[: PREAMBLE.size])
    header = json.loads(data[PREAMBLE.size : PREAMBLE.size + header_bytes])
    change(header)
    text = json.dumps(header).encode().ljust(header_bytes)
    assert len(text) == header_bytes
    preamble = PREAMBLE.pack(magic, version, header_bytes, hashlib.sha256(text).digest())
    path.write_bytes(preamble + text + data[PREAMBLE.size + header_bytes :])


def test_the_tokens_are_the_bytes(path: Path) -> None:
    file = TokenFile.open(path, verify=True)
    assert file.tokens.dtype == np.uint8
    assert isinstance(file.tokens, np.memmap)
    assert file.tokens.tobytes() == TEXT
    assert file.split("train") == (0, 7650)
    assert file.split("validation") == (7650, 10200)
    assert file.bytes_per_token("train") == file.bytes_per_token("validation") == 1.0
    assert file.tokenizer.decode(file.tokens[:3]) == TEXT[:3]
    assert file.header.sha256 == hashlib.sha256(TEXT).hexdigest()


def test_tokens_start_on_a_page_and_are_read_only(path: Path) -> None:
    file = TokenFile.open(path)
    assert (path.stat().st_size - len(TEXT) - 2 * 8) % 4096 == 0
    with pytest.raises(ValueError, match="read-only"):
        file.tokens[0] = 1


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no token file .*longnet prepare"):
        TokenFile.open(tmp_path / "none.tokens")


@pytest.mark.parametrize("content", [b"", b"LONG", b"Call me Ishmael. Some years ago - never mind how long"])
def test_foreign_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "novel.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is not a token file|truncated"):
        TokenFile.open(path)


@pytest.mark.parametrize("size", [8, 30, PREAMBLE.size, 1000, 4096, -1])
def test_truncated_anywhere(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match="truncated"):
        TokenFile.open(path)


def test_too_long(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(DataError, match="too long"):
        TokenFile.open(path)


@pytest.mark.parametrize("position", [0, 8, 13, 20, 60, 4000])
def test_flipped_header_byte_is_always_found(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"not a token file|version|truncated|damaged"):
        TokenFile.open(path)


@pytest.mark.parametrize(("position", "what"), [(4096, "tokens"), (-17, "tokens"), (-1, "edges of documents")])
def test_flipped_byte_is_found_by_verify(path: Path, position: int, what: str) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    TokenFile.open(path)
    with pytest.raises(DataError, match=rf"the {what} (of|in) .* are damaged"):
        TokenFile.open(path, verify=True)


def test_newer_version(path: Path) -> None:
    data = path.read_bytes()
    magic, version, header_bytes, digest = PREAMBLE.unpack(data[: PREAMBLE.size])
    path.write_bytes(PREAMBLE.pack(magic, version + 1, header_bytes, digest) + data[PREAMBLE.size :])
    with pytest.raises(DataError, match=r"version 2.*up to 1.*update"):
        TokenFile.open(path)


def test_bad_json(path: Path) -> None:
    data = path.read_bytes()
    magic, version, header_bytes, _ = PREAMBLE.unpack(data[: PREAMBLE.size])
    text = b"{" * header_bytes
    preamble = PREAMBLE.pack(magic, version, header_bytes, hashlib.sha256(text).digest())
    path.write_bytes(preamble + text + data[PREAMBLE.size + header_bytes :])
    with pytest.raises(DataError, match=r"wrong at JSON"):
        TokenFile.open(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.update(num_tokens=-5), "num_tokens"),
        (lambda header: header.update(num_tokens="many"), "num_tokens"),
        (lambda header: header["train"].update(num_bytes=-1), r"train\.num_bytes"),
        (lambda header: header.update(dtype="float64"), "dtype"),
        (lambda header: header.update(dtype="uint16"), "truncated"),
        (lambda header: header.update(max_id=256), "max_id does not fit"),
        (lambda header: header.pop("tokenizer"), "tokenizer"),
        (lambda header: header.update(colour="blue"), "colour"),
        (lambda header: header.update(sha256="0"), "sha256"),
        (lambda header: header["validation"].update(first=3), "two parts"),
        (lambda header: header["train"].update(first=-1), "first"),
        (lambda header: header["train"].update(num_bytes=3), "add up"),
    ],
)
def test_impossible_header(path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    change_header(path, change)
    with pytest.raises(DataError, match=message):
        TokenFile.open(path)


def test_no_tokens(path: Path) -> None:
    def empty(header: dict[str, Any]) -> None:
        nothing = {"first": 0, "last": 0, "num_bytes": 0}
        header.update(num_tokens=0, num_bytes=0, train=nothing, validation=nothing)

    change_header(path, empty)
    with pytest.raises(DataError, match="holds no tokens"):
        TokenFile.open(path)


def test_unknown_and_empty_splits(tmp_path: Path, path: Path) -> None:
    with pytest.raises(DataError, match="not 'test'"):
        TokenFile.open(path).split("test")  # type: ignore[arg-type]
    whole = tmp_path / "whole.tokens"
    with TokenFileWriter(whole, ByteTokenizer(), validation=0) as writer:
        writer.add_document([TEXT])
    with pytest.raises(DataError, match=r"validation split .* is empty"):
        TokenFile.open(whole).bytes_per_token("validation")


def test_a_folder_is_no_token_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder, .*: longnet prepare .* --output .*\.tokens"):
        TokenFile.open(tmp_path)
