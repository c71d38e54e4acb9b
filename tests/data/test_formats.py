"""JSON lines, Parquet and FASTA are documents; compressed files, pipes and links are read or counted."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longnet_dist.data.corpus import ARCHIVED_LINK, NO_FILE, NO_TARGET, NO_TEXT, Corpus, find_corpus
from longnet_dist.data.formats.document import lines_of
from longnet_dist.data.prepare import prepare
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.errors import DataError, MissingExtraError

TEXTS = ["first\nwith a line", "zweites – Stück 😀", "x" * 100_000, "last"]


def texts(corpus: Corpus) -> list[bytes]:
    return [b"".join(document.chunks) for document in corpus]


def json_lines(rows: Iterable[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ENCODED = [text.encode() for text in TEXTS]
LINES = json_lines({"text": text, "id": 1} for text in TEXTS)


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))  # two frames


def parquet(rows: dict[str, list[Any]]) -> bytes:
    pyarrow, table_file = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    buffer = io.BytesIO()
    table_file.write_table(pyarrow.table(rows), buffer, row_group_size=2)
    return buffer.getvalue()


def two_columns() -> bytes:
    """Return a Parquet file in which two columns have the name of the text."""
    pyarrow, table_file = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    table_file.write_table(pyarrow.table([pyarrow.array(["a"])] * 2, names=["text", "text"]), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", bytes),
        ("a.NDJSON", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.zst", zstd),
        ("a.parquet", lambda _: parquet({"id": [1, 2, 3, 4], "text": TEXTS})),
    ],
)
def test_a_row_is_a_document(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / name).write_bytes(pack(LINES))
    assert texts(find_corpus([tmp_path])) == ENCODED


def test_members_of_archives_have_formats(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jsonl", LINES)
        archive.writestr("b.txt", LINES)
    assert texts(find_corpus([tmp_path])) == [*ENCODED, LINES]


def test_format_and_column_can_be_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(json_lines([{"body": "a"}, {"body": "b", "text": 1}]) + b"\n \n")
    assert texts(find_corpus([tmp_path], format="jsonl", text_column="body")) == [b"a", b"b"]
    (tmp_path / "a.txt").rename(tmp_path / "a.jsonl")
    assert texts(find_corpus([tmp_path], format="text"))[0].startswith(b'{"body"')


def test_rows_without_text_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"text": None}, {"text": ""}, {"text": "a"}]))
    corpus = find_corpus([tmp_path])
    assert texts(corpus) == [b"a"]
    assert corpus.left_out == {NO_TEXT: (2, f"{tmp_path}/a.jsonl, line 1")}


def test_columns_of_categories_and_of_nulls_are_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(parquet({"text": pyarrow.array(["a", None, "b", "a"]).dictionary_encode()}))
    (tmp_path / "b.parquet").write_bytes(parquet({"text": [None, None]}))
    corpus = find_corpus([tmp_path])
    assert texts(corpus) == [b"a", b"b", b"a"]
    assert corpus.left_out == {NO_TEXT: (3, f"{tmp_path}/a.parquet, row 2")}


def test_a_corpus_without_text_says_what_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"text": None}, {"text": ""}]))
    with pytest.raises(DataError, match=r"no text .*2 rows without text skipped \(the first is .*a\.jsonl, line 1\)"):
        prepare(find_corpus([tmp_path]), tmp_path / "o.tokens", ByteTokenizer())


def test_a_closed_standard_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="standard input is closed"):
        texts(find_corpus(["-"]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"a\.jsonl, line 2 is no JSON"),
        (b"[1]", r"line 2 has no keys, and no 'text'"),
        (b'{"body": "a", "id": 2}', r"line 2 has the keys 'body', 'id', and no 'text'; .*--text-column KEY"),
        (b'{"text": 3}', r"line 2: 'text' must be text, not int"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        texts(find_corpus([tmp_path]))


def test_wrong_parquet_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for data, message in [
        (b"PAR1 and no more", "cannot be read as Parquet"),
        (parquet({"body": ["a"]}), r"columns body, and no 'text'; .*--text-column"),
        (parquet({"text": [1]}), "must be text, not int64"),
        (two_columns(), r"a\.parquet has 2 columns 'text'; rename"),
    ]:
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            texts(find_corpus([path]))
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(parquet({"text": ["a"]})))
    assert texts(find_corpus([tmp_path / "a.parquet.gz"])) == [b"a"]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(path, "a.parquet")
    with pytest.raises(DataError, match=r"a\.tar/a\.parquet is in a tar archive"):
        texts(find_corpus([tmp_path / "a.tar"]))


@pytest.mark.parametrize(("package", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.zst")])
def test_an_absent_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str) -> None:
    (tmp_path / name).write_bytes(b"data")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"needs {package}, .*pip install 'longnet-dist\[data\]'"):
        texts(find_corpus([tmp_path]))


def test_a_damaged_zstandard_file_is_named(tmp_path: Path) -> None:
    data = bytearray(zstd(LINES))
    data[20] ^= 0xFF
    (tmp_path / "a.txt.zst").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.txt\.zst cannot be read"):
        texts(find_corpus([tmp_path]))


@pytest.mark.parametrize("lost", [1, 2, 10])
def test_a_cut_zstandard_file_is_named(tmp_path: Path, lost: int) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstd(LINES)[:-lost])
    with pytest.raises(DataError, match=r"a\.txt\.zst cannot be read .*ended before"):
        texts(find_corpus([tmp_path]))


def test_a_long_zstandard_file_of_many_frames_is_read_whole(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    parts = [np.random.default_rng(size).bytes(size).replace(b"\0", b"1") for size in (1, 0, 300_000, 8192, 5)]
    frames = [zstandard.ZstdCompressor().compress(part) for part in parts]
    skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    (tmp_path / "a.txt.zst").write_bytes(skippable.join(frames))
    assert texts(find_corpus([tmp_path])) == [b"".join(parts)]


def test_a_tar_archive_may_be_compressed_with_zstandard(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        (tmp_path / "text").write_text("hello")
        archive.add(tmp_path / "text", "text")
    (tmp_path / "a.tar.zst").write_bytes(zstd(buffer.getvalue()))
    assert texts(find_corpus([tmp_path / "a.tar.zst"])) == [b"hello"]


FASTA = (
    b";comment\n>chr1 first chromosome\nACGT\nAC\n\n>chr2\r\nGG\r\n;note\r\nTT\r\n>empty\n>chr3\n" + b"N" * 61 + b"\n"
)


@pytest.mark.parametrize("name", ["a.fa", "a.fasta", "a.fna.gz", "a.faa.zst"])
def test_a_record_is_a_document_and_its_lines_are_joined(tmp_path: Path, name: str) -> None:
    pack = gzip.compress if name.endswith("gz") else zstd if name.endswith("zst") else bytes
    (tmp_path / name).write_bytes(pack(FASTA))
    found = [text for text in texts(find_corpus([tmp_path])) if text]
    assert found == [b"ACGTAC", b"GGTT", b"N" * 61]
    prepared = prepare(find_corpus([tmp_path]), tmp_path / "out.tokens", ByteTokenizer())
    assert prepared.header.num_documents == 3


def test_names_of_records(tmp_path: Path) -> None:
    (tmp_path / "a.fa").write_bytes(FASTA)
    names = [document.name for document in find_corpus([tmp_path])]
    assert names[1:3] == [f"{tmp_path}/a.fa, record chr1", f"{tmp_path}/a.fa, record chr2"]


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_lines_do_not_depend_on_chunks(size: int) -> None:
    text = b"\n\na\nbc\r\n" + b"d" * 50 + b"\n\ne"
    chunks = (text[first : first + size] for first in range(0, len(text), size))
    assert list(lines_of(chunks)) == text.split(b"\n")


def test_pipes_and_sockets_in_a_folder_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a").write_text("a")
    os.mkfifo(folder / "pipe")
    (folder / "nowhere").symlink_to(folder / "missing")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket must be short
        try:
            server.bind("socket")
        finally:
            os.chdir(here)
        corpus = find_corpus([folder])
        assert texts(corpus) == [b"a"]
        with pytest.raises(DataError, match="is a socket"):
            texts(find_corpus([folder / "socket"]))
    assert corpus.left_out == {NO_TARGET: (1, f"{folder}/nowhere"), NO_FILE: (2, f"{folder}/pipe")}
    summary = prepare(find_corpus([folder]), tmp_path / "out.tokens", ByteTokenizer(), validation=0).summary()
    assert f"2 named pipes, sockets and devices skipped (the first is {folder}/pipe)" in summary


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    for name in ("in", "out/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "text").write_text(name)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "out")
    (tmp_path / "out" / "deep" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self").symlink_to(".")
    assert texts(find_corpus([tmp_path / "in"])) == [b"in", b"out/deep"]


def test_what_archives_leave_out_is_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"member{kind.decode()}")
            member.type, member.linkname = kind, "text"
            archive.addfile(member)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive_of_windows:
        archive_of_windows.writestr(".git\\config", "secret")
        archive_of_windows.writestr("folder\\.cache\\x", "secret")
        archive_of_windows.writestr("folder\\text", "text")
    corpus = find_corpus([tmp_path])
    assert texts(corpus) == [b"text"]
    assert corpus.left_out == {ARCHIVED_LINK: (3, f"{tmp_path}/a.tar/member2")}
    assert corpus.num_hidden == 2


def test_a_pipe_that_is_named_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    writer = threading.Thread(target=(tmp_path / "pipe.jsonl").write_bytes, args=[LINES])
    writer.start()
    corpus = find_corpus([tmp_path / "pipe.jsonl"])
    assert (corpus.total_bytes, corpus.repeatable) == (0, False)
    assert texts(corpus) == ENCODED
    writer.join()
