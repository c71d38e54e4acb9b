"""A written token file has exact counts and exact splits; a failed write leaves no file."""

from __future__ import annotations

import os
import resource
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from longnet_dist.data.token_file import TokenFile
from longnet_dist.data.token_file_writer import TokenFileWriter
from longnet_dist.data.tokenizers import PIECE_BYTES, ByteTokenizer, Ids, Tokenizer, load_tokenizer
from longnet_dist.errors import DataError

DOCUMENTS = [b"first\n" * 50, "zweites – Stück\n".encode() * 70, b"third"]


class WideTokenizer(ByteTokenizer):
    """This tokenizer shifts bytes to the upper end of a large vocabulary."""

    def __init__(self, vocab_size: int, document_separator: int | None) -> None:
        self.vocab_size = vocab_size
        self.document_separator = document_separator

    def encode(self, text: bytes) -> Ids:
        return super().encode(text).astype(np.uint32) + (self.vocab_size - 256)

    def decode(self, ids: object) -> bytes:
        return super().decode(np.asarray(ids, dtype=np.int64) - (self.vocab_size - 256))


def write(path: Path, tokenizer: Tokenizer, documents: list[bytes] = DOCUMENTS, **options: object) -> TokenFile:
    with TokenFileWriter(path, tokenizer, **options) as writer:  # type: ignore[arg-type]
        for document in documents:
            writer.add_document([document[:7], document[7:]])
    return TokenFile.open(path, verify=True)


def test_separators_stand_between_documents(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tokens", ByteTokenizer(), [b"", *DOCUMENTS[:2], b"", DOCUMENTS[2]])
    assert file.tokens.tobytes() == b"\0".join(DOCUMENTS)
    assert file.header.num_documents == 3
    assert file.header.num_bytes == file.header.num_tokens == len(file.tokens)


def test_a_vocabulary_without_separator_joins_documents(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tokens", WideTokenizer(256, None))
    assert file.tokens.tobytes() == b"".join(DOCUMENTS)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_the_vocabulary_decides_the_type(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    file = write(tmp_path / "a.tokens", WideTokenizer(vocab_size, vocab_size - 1))
    assert file.header.dtype == file.tokens.dtype.name == dtype
    assert file.header.max_id == vocab_size - 1
    first = np.frombuffer(DOCUMENTS[0], dtype=np.uint8).astype(np.int64) + vocab_size - 256
    np.testing.assert_array_equal(file.tokens[: len(first)], first)


@pytest.mark.parametrize("validation", [0.0, 0.05, 0.3, 0.999])
def test_bytes_of_a_split_are_exact(tmp_path: Path, tokenizer_json: Path, validation: float) -> None:
    tokenizer = load_tokenizer(str(tokenizer_json))
    file = write(tmp_path / "a.tokens", tokenizer, validation=validation)
    separator = tokenizer.document_separator
    for name in ("train", "validation"):
        first, last = file.split(name)  # type: ignore[arg-type]
        ids = file.tokens[first:last]
        text = tokenizer.decode(ids[ids != separator])
        text.decode("utf-8")  # no split inside a character
        num_bytes = len(text) + int((ids == separator).sum())
        assert getattr(file.header, name).num_bytes == num_bytes
        if last > first:
            assert file.bytes_per_token(name) == num_bytes / (last - first)  # type: ignore[arg-type]
    assert abs(file.split("train")[1] - len(file.tokens) * (1 - validation)) < 9


class SpacelessTokenizer(WideTokenizer):
    """This tokenizer loses bytes, as tokenizers that normalise do."""

    def __init__(self) -> None:
        super().__init__(256, 0)

    def encode(self, text: bytes) -> Ids:
        return super().encode(text.replace(b" ", b""))


def test_only_what_tokens_stand_for_counts(tmp_path: Path) -> None:
    documents = [b"a b c d e f g h", b"i j", b"k l m n"]
    with TokenFileWriter(tmp_path / "a.tokens", SpacelessTokenizer(), validation=0.4) as writer:
        for document in documents:
            writer.add_document([document])
    file = TokenFile.open(tmp_path / "a.tokens", verify=True)
    assert file.tokens.tobytes() == b"abcdefgh\0ij\0klmn"
    # The split does not need a tokenizer that returns what it was given.
    assert file.header.train.model_dump() == {"first": 0, "last": 10, "num_bytes": 10}
    assert file.header.num_bytes == 16
    assert (writer.num_lost, writer.num_read) == (7 + 1 + 3, 15 + 3 + 7)


@pytest.mark.parametrize("share", [1e-9, 0.05, 0.999999])
@pytest.mark.parametrize("text", [b"ab", b"abc", b"abcd", "ä€😀".encode() * 3])
def test_no_split_is_empty_unless_that_is_wanted(
    tmp_path: Path, tokenizer_json: Path, text: bytes, share: float
) -> None:
    for number, tokenizer in enumerate([ByteTokenizer(), SpacelessTokenizer(), load_tokenizer(str(tokenizer_json))]):
        file = write(tmp_path / f"{number}.tokens", tokenizer, [text], validation=share)
        least = 2 if file.header.num_tokens > 3 else 1
        for split in (file.header.train, file.header.validation):
            assert split.last - split.first >= least
        none = write(tmp_path / f"{number}.tokens", tokenizer, [text], validation=0, overwrite=True)
        assert none.split("validation") == (none.header.num_tokens, none.header.num_tokens)


def test_one_token_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 token, which cannot be shared.*--validation 0"):
        write(tmp_path / "a.tokens", ByteTokenizer(), [b"a"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_impossible_seed(tmp_path: Path, seed: int) -> None:
    with pytest.raises(DataError, match=r"from 0 to 2\^64 - 1"):
        TokenFileWriter(tmp_path / "a.tokens", ByteTokenizer(), shuffle=seed)
    write(tmp_path / "a.tokens", ByteTokenizer(), shuffle=2**64 - 1)


@pytest.mark.parametrize("separator", [0, None])
def test_shuffled_documents_are_the_documents(tmp_path: Path, separator: int | None) -> None:
    texts = [bytes([97 + number % 26]) * (1 + number % 7) for number in range(100)]
    files = [
        write(tmp_path / f"{number}.tokens", WideTokenizer(256, separator), texts, shuffle=seed, validation=0.2)
        for number, seed in enumerate([5, 5, 6, None])
    ]
    order = []
    for file in files:
        edges = np.array(file.edges).tolist()
        order.append([file.tokens[a:b].tobytes().rstrip(b"\0") for a, b in pairwise(edges)])
        assert file.header.num_bytes == file.header.num_tokens == len(b"".join(texts)) + 99 * (separator == 0)
    assert order[0] == order[1] != order[2]
    assert order[3] == texts != order[0]
    assert sorted(order[0]) == sorted(order[2]) == sorted(texts)
    assert files[0].split("train")[1] in np.array(files[0].edges).tolist()  # no document is in both
    assert files[0].header.train.num_bytes == files[0].split("train")[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number}.tokens" for number in range(4)]


def test_undecodable_bytes_are_replaced_and_counted(tmp_path: Path, tokenizer_json: Path) -> None:
    with TokenFileWriter(tmp_path / "a.tokens", load_tokenizer(str(tokenizer_json))) as writer:
        writer.add_document(["caf\xe9 \ufffd".encode("latin-1", errors="replace"), b"\xff!"])
    assert writer.num_replaced == 2
    file = TokenFile.open(writer.path)
    assert file.tokenizer.decode(file.tokens) == "caf\ufffd ?\ufffd!".encode()


def test_an_existing_file_is_kept_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    before = write(path, ByteTokenizer()).tokens.tobytes()
    with pytest.raises(DataError, match="not overwritten"):
        TokenFileWriter(path, ByteTokenizer())
    assert TokenFile.open(path, verify=True).tokens.tobytes() == before
    assert write(path, ByteTokenizer(), [b"new"], overwrite=True).tokens.tobytes() == b"new"


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"

    def document() -> Iterator[bytes]:
        path.write_bytes(b"mine")
        yield b"text"

    with pytest.raises(DataError, match="not overwritten"), TokenFileWriter(path, ByteTokenizer()) as writer:
        writer.add_document(document())
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    before = write(path, ByteTokenizer()).tokens.tobytes()

    def document() -> Iterator[bytes]:
        yield b"half" * PIECE_BYTES
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), TokenFileWriter(path, ByteTokenizer(), overwrite=True) as writer:
        writer.add_document(document())
    assert list(tmp_path.iterdir()) == [path]
    assert TokenFile.open(path, verify=True).tokens.tobytes() == before


def test_a_corpus_without_text_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        write(tmp_path / "a.tokens", ByteTokenizer(), [b""])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("validation", [-0.1, 1.0, float("nan")])
def test_impossible_share(tmp_path: Path, validation: float) -> None:
    with pytest.raises(DataError, match="validation is a share"):
        TokenFileWriter(tmp_path / "a.tokens", ByteTokenizer(), validation=validation)


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DataError, match="cannot be written"),
        TokenFileWriter(tmp_path / "file" / "a.tokens", ByteTokenizer()),
    ):
        pass
    with pytest.raises(DataError, match="is a folder"):
        TokenFileWriter(tmp_path, ByteTokenizer())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is a device or a pipe"):
        TokenFileWriter(tmp_path / "pipe", ByteTokenizer(), overwrite=True)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """A limit on the size of files, for this process alone, replaces a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with (
            pytest.raises(DataError, match=r"a\.tokens cannot be written: File too large"),
            TokenFileWriter(tmp_path / "a.tokens", ByteTokenizer()) as writer,
        ):
            writer.add_document([b"text" * 100_000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    chunk = b"a line of text that goes on for a while\n" * 25_000
    tracemalloc.start()
    try:
        with TokenFileWriter(tmp_path / "a.tokens", ByteTokenizer()) as writer:
            writer.add_document(chunk for _ in range(40))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert writer.num_bytes == 40_000_000
    assert peak_bytes < 8_000_000
