"""A corpus, given or default, becomes a token file."""

from __future__ import annotations

from pathlib import Path

import pytest

from longnet_dist.data import prepare as prepare_module
from longnet_dist.data.corpus import Corpus, find_corpus
from longnet_dist.data.prepare import default_token_file, prepare
from longnet_dist.data.token_file import TokenFile
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.errors import DataError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the standard library, which would take a second each time, by a small folder."""
    path = tmp_path / "module.py"
    path.write_text("import this\n" * 100)
    monkeypatch.setattr(prepare_module, "standard_library", lambda: Corpus([path]))
    return path


def test_a_plain_file_as_bytes_is_itself(tmp_path: Path) -> None:
    text = bytes(range(1, 256)) * 8000  # more than one chunk and several pieces
    (tmp_path / "plain").write_bytes(text)
    prepared = prepare(find_corpus([tmp_path / "plain"]), tmp_path / "out" / "plain.tokens", ByteTokenizer())
    assert TokenFile.open(prepared.path, verify=True).tokens.tobytes() == text
    assert prepared.header.num_documents == 1


def test_summary_counts_everything(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"a" * 1200)
    (folder / "b.bin").write_bytes(b"\0")
    (folder / ".c").write_bytes(b"c")
    summary = prepare(find_corpus([folder]), tmp_path / "a.tokens", ByteTokenizer(), validation=0.25).summary()
    assert "a.tokens: 1 documents, 1,200 bytes -> 1,200 tokens (900 train, 300 validation), uint8, " in summary
    assert summary.endswith("MB/s\n1 binary files skipped, 1 hidden files and folders skipped")


def test_an_input_is_never_the_output(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("text")
    with pytest.raises(DataError, match="one of the inputs"):
        prepare(find_corpus([path]), tmp_path / "." / "text", ByteTokenizer(), overwrite=True)
    assert path.read_text() == "text"


def test_only_binary_files(tmp_path: Path) -> None:
    (tmp_path / "b.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"no text \(1 files; 1 binary and 0 hidden"):
        prepare(find_corpus([tmp_path]), tmp_path / "a.tokens", ByteTokenizer())
    assert not (tmp_path / "a.tokens").exists()


def test_default_file_is_prepared_once(tmp_path: Path, library: Path) -> None:
    path = default_token_file(tmp_path / "cache")
    assert TokenFile.open(path).tokens.tobytes() == library.read_bytes()
    before = path.stat().st_mtime_ns
    assert default_token_file(tmp_path / "cache") == path
    assert path.stat().st_mtime_ns == before


def test_default_file_of_another_source_is_made_anew(tmp_path: Path, library: Path) -> None:
    path = default_token_file(tmp_path)
    prepare(Corpus([library]), path, ByteTokenizer(), overwrite=True, source="another Python")
    assert TokenFile.open(default_token_file(tmp_path)).header.source.startswith("standard library of")


def test_damaged_default_file_is_named(tmp_path: Path, library: Path) -> None:
    path = default_token_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="truncated"):
        default_token_file(tmp_path)
