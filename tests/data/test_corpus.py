"""Documents are found and streamed from every kind of input; damaged ones are reported."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from longnet_dist.data.corpus import HEAD_BYTES, Corpus, find_corpus, standard_library
from longnet_dist.errors import DataError

FILES = {
    "b.txt": b"second\n",
    "a.txt": b"first\n" * 4000,
    "latin.txt": b"caf\xe9\n",
    "deep/c.txt": b"third\n",
    "image.png": b"\x89PNG\0\1\2",
    "late.txt": b"x" * HEAD_BYTES + b"\0",
    ".hidden": b"secret\n",
    ".git/config": b"secret\n",
    "empty.txt": b"",
}
SORTED_TEXTS = [FILES[name] for name in ("a.txt", "b.txt", "late.txt", "latin.txt", "deep/c.txt")]


def read(corpus: Corpus) -> list[bytes]:
    return [b"".join(document.chunks) for document in corpus]


def make_folder(root: Path) -> Path:
    for name, content in FILES.items():
        path = root / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root / "folder"


def make_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/", "")
        for name, content in FILES.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, mode: str) -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in FILES.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
        archive.addfile(link)
    return path


ARCHIVES: dict[str, Callable[[Path], Path]] = {
    "t.zip": make_zip,
    "t.tar": lambda path: make_tar(path, "w"),
    "t.tar.gz": lambda path: make_tar(path, "w:gz"),
    "t.tgz": lambda path: make_tar(path, "w:gz"),
    "t.tar.xz": lambda path: make_tar(path, "w:xz"),
    "T.TAR.BZ2": lambda path: make_tar(path, "w:bz2"),
}
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def test_folder_is_walked_sorted_without_hidden_and_binary_files(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "loop").symlink_to(folder)
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    corpus = find_corpus([folder])
    assert read(corpus) == SORTED_TEXTS
    assert (corpus.num_hidden, corpus.num_binary) == (2, 1)
    assert corpus.bytes_read == corpus.total_bytes


@pytest.mark.parametrize("name", ARCHIVES)
def test_archive_gives_its_files_in_its_order(tmp_path: Path, name: str) -> None:
    corpus = find_corpus([ARCHIVES[name](tmp_path / name)])
    documents = [(document.name, b"".join(document.chunks)) for document in corpus]
    names = [name for name in FILES if FILES[name] in SORTED_TEXTS]
    assert [content for _, content in documents] == [FILES[name] for name in names]
    assert all(str(tmp_path / name) in document for document, _ in documents)
    assert (corpus.num_hidden, corpus.num_binary) == (2, 1)


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    text = os.urandom(3_000_000).replace(b"\0", b"\1")
    path = tmp_path / f"text{suffix}"
    path.write_bytes(COMPRESSORS[suffix](text))
    assert read(find_corpus([path])) == [text]


def test_documents_come_in_chunks(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_bytes(b"line\n" * 1_000_000)
    for document in find_corpus([tmp_path]):
        assert max(len(chunk) for chunk in document.chunks) <= 1 << 20


def test_inputs_in_the_order_given_and_never_twice(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    corpus = find_corpus([folder / "b.txt", str(folder / "*.txt"), folder / ".." / "folder"])
    assert read(corpus) == [FILES["b.txt"], *(text for text in SORTED_TEXTS if text != FILES["b.txt"])]


def test_globs(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    names = ["a.txt", "b.txt", "deep/c.txt", "late.txt", "latin.txt"]
    assert read(find_corpus([str(folder / "**" / "*.txt")])) == [FILES[name] for name in names]
    assert read(find_corpus([str(folder / "de*")])) == [FILES["deep/c.txt"]]
    odd = tmp_path / "odd[1].txt"
    odd.write_bytes(b"odd")
    assert read(find_corpus([str(odd)])) == [b"odd"]


def test_a_named_hidden_file_is_read(tmp_path: Path) -> None:
    assert read(find_corpus([make_folder(tmp_path) / ".hidden"])) == [FILES[".hidden"]]


@pytest.mark.parametrize("missing", ["no/such/file.txt", "*.nothing"])
def test_missing_input(tmp_path: Path, missing: str) -> None:
    with pytest.raises(DataError, match="there is no file, folder or match"):
        find_corpus([tmp_path / missing])


@pytest.mark.parametrize("name", ["t.zip", "t.tar", "t.tar.gz", "t.tar.xz", "t.gz", "t.xz", "t.bz2"])
@pytest.mark.parametrize("damage", ["truncated", "foreign", "flipped"])
def test_damaged_archive_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    if name in ARCHIVES:
        ARCHIVES[name](path)
    else:
        path.write_bytes(COMPRESSORS[path.suffix](os.urandom(100_000).replace(b"\0", b"\1")))
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[len(data) * 2 // 3 :]
    elif damage == "foreign":
        data = bytearray(b"This is no archive.\n" * 40)
    elif name == "t.tar":
        data[data.rindex(b"late.txt")] ^= 0xFF  # in a header, which carries a checksum; contents carry none
    else:
        data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{name}.* cannot be read"):
        read(find_corpus([path]))


def test_encrypted_zip_is_named(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "t.zip")
    data = bytearray(path.read_bytes())
    position = 0
    while (position := data.find(b"PK\1\2", position)) >= 0:  # set the flag in every entry of the directory
        data[position + 8] |= 1
        position += 4
    position = 0
    while (position := data.find(b"PK\3\4", position)) >= 0:
        data[position + 6] |= 1
        position += 4
    path.write_bytes(data)
    with pytest.raises(DataError, match="encrypted"):
        read(find_corpus([path]))


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone.txt"
    path.write_text("text")
    corpus = find_corpus([path])
    path.unlink()
    with pytest.raises(DataError, match=r"gone\.txt cannot be read \(No such file"):
        read(corpus)


def test_standard_library_is_real_code_without_tests() -> None:
    corpus = standard_library()
    assert corpus.paths == standard_library().paths == sorted(corpus.paths)
    names = {path.name for path in corpus.paths}
    assert {"argparse.py", "dataclasses.py", "tarfile.py"} <= names
    assert corpus.total_bytes > 5_000_000
    for path in corpus.paths:
        assert not {"test", "site-packages", "dist-packages"} & set(path.parts[len(Path(sys.prefix).parts) :])
