"""A corpus streams the documents of files, folders, globs and archives, one after the other."""

from __future__ import annotations

import contextlib
import glob
import lzma
import os
import stat
import sys
import sysconfig
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, BinaryIO, Self, cast

from longnet_dist.data.formats.choice import Format, format_of
from longnet_dist.data.formats.compression import Counting, decompressed
from longnet_dist.data.formats.document import Document
from longnet_dist.data.formats.fasta import fasta_documents
from longnet_dist.data.formats.json_rows import json_documents
from longnet_dist.data.formats.parquet import parquet_documents
from longnet_dist.errors import DataError

__all__ = ["Corpus", "Document", "find_corpus", "standard_library"]

STANDARD_INPUT = "-"
CHUNK_BYTES = 1 << 20
HEAD_BYTES = 8192  # a zero byte in this part makes a file binary, as for git and grep
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tar.zst", ".tzst")
# A damaged or encrypted file raises any of these; zipfile raises RuntimeError if a password is needed.
READ_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
)
NO_FILE = "named pipes, sockets and devices skipped"
NO_TARGET = "links that lead nowhere skipped"
ARCHIVED_LINK = "links and special files in archives skipped"
NO_TEXT = "rows without text skipped"


@dataclass
class Corpus:
    """A Corpus iterates over the documents of files, in the order given, without loading any of them into memory.

    * A ``.zip`` or tar archive (also ``.tar.gz``, ``.tar.xz``, ``.tar.bz2``, ``.tar.zst``) gives the documents of each
      file in it, in the archive's order. An archive inside an archive is not opened.
    * A ``.jsonl`` or ``.ndjson`` file gives a document for each line, a ``.parquet`` file for each row, a FASTA file
      for each record.
    * Any other file is one document; ``.gz``, ``.xz``, ``.bz2`` and ``.zst`` files are decompressed.
    * A file with a zero byte in its first 8 KiB is binary and is skipped. An empty file is left out.

    Args:
        paths: files, as from :func:`find_corpus`; ``-`` is standard input.
        num_hidden: number of hidden files that were skipped when the paths were collected.
        left_out: what else was left out then, by kind: how many, and the name of the first.
        format: how all files are read; None: by their names.
        text_column: key of a JSON line, and column of a Parquet file, that is the text.

    Attributes:
        num_hidden, num_binary: files skipped so far, with archive members.
        left_out: as the argument, with archive members.
        total_bytes: size of all files on disk; that of pipes is not known.

    Raises:
        DataError: while iterating: a file cannot be read, or an archive is damaged or encrypted.
    """

    paths: list[Path]
    num_hidden: int = 0
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    format: Format | None = None
    text_column: str = "text"
    num_binary: int = field(default=0, init=False)
    total_bytes: int = field(init=False)
    _finished_bytes: int = field(default=0, init=False)
    _file: Counting | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.left_out = dict(self.left_out)
        self.total_bytes = sum(_size(path) for path in self.paths)

    @property
    def bytes_read(self) -> int:
        """Return how many of the ``total_bytes`` have been read so far."""
        return self._finished_bytes + (self._file.num_read if self._file is not None else 0)

    @property
    def repeatable(self) -> bool:
        """Say whether the corpus can be read twice: it has no standard input and no pipe."""
        return all(path.is_file() for path in self.paths)

    def __iter__(self) -> Iterator[Document]:
        for path in self.paths:
            with _naming(str(path)), _opened(path) as file:
                self._file = Counting(file)
                for name, stream in self._streams(path, cast(BinaryIO, self._file)):
                    yield from self._documents(name, stream)
            self._file = None
            self._finished_bytes += _size(path)

    def _documents(self, name: str, stream: IO[bytes]) -> Iterator[Document]:
        """Yield the documents of a file or archive member."""
        kind = self.format or format_of(name)
        if kind == "parquet":
            yield from parquet_documents(name, stream, self.text_column, self._note_empty)
            return
        head = stream.read(HEAD_BYTES)
        if b"\0" in head:
            self.num_binary += 1
        elif head:
            chunks = chain([head], _chunks(name, stream))
            if kind == "jsonl":
                yield from json_documents(name, chunks, self.text_column, self._note_empty)
            elif kind == "fasta":
                yield from fasta_documents(name, chunks)
            else:
                yield Document(name, chunks)

    def _note_empty(self, name: str) -> None:
        _note(self.left_out, NO_TEXT, name)

    def _streams(self, path: Path, file: BinaryIO) -> Iterator[tuple[str, IO[bytes]]]:
        """Yield the name and the byte stream of every document in a file."""
        name = path.name.lower()
        if name.endswith(TAR_SUFFIXES):
            yield from self._tar_members(path, file)
        elif name.endswith(".zip"):
            yield from self._zip_members(path, file)
        else:
            with decompressed(str(path), file) as stream:
                yield str(path), stream

    def _zip_members(self, path: Path, file: BinaryIO) -> Iterator[tuple[str, IO[bytes]]]:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if not member.is_dir() and not self._skip_hidden(member.filename):
                    with archive.open(member) as stream:
                        yield f"{path}/{member.filename}", stream

    def _tar_members(self, path: Path, file: BinaryIO) -> Iterator[tuple[str, IO[bytes]]]:
        # tarfile finds out by itself how an archive is compressed, except for Zstandard.
        zstandard = path.name.lower().endswith((".tar.zst", ".tzst"))
        with (
            decompressed("archive.zst" if zstandard else "archive", file) as stream_of_members,
            tarfile.open(fileobj=stream_of_members, mode="r|*", tarinfo=_StrictTarInfo) as archive,
        ):
            for member in archive:
                if member.isdir() or self._skip_hidden(member.name):
                    continue
                if not member.isfile():
                    _note(self.left_out, ARCHIVED_LINK, f"{path}/{member.name}")
                else:
                    stream = archive.extractfile(member)
                    assert stream is not None  # it is a regular file
                    yield f"{path}/{member.name}", stream

    def _skip_hidden(self, member: str) -> bool:
        parts = member.replace("\\", "/").split("/")  # some archives made on Windows have its separator
        hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
        self.num_hidden += hidden
        return hidden


class _StrictTarInfo(tarfile.TarInfo):
    """Raise on a damaged header.

    Behind the first member, tarfile takes a damaged header for the end of the archive and silently drops the rest.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"damaged archive: {error}") from error


def find_corpus(inputs: Iterable[str | Path], *, format: Format | None = None, text_column: str = "text") -> Corpus:
    """Collect the files of files, folders and globs, each in the order given.

    A folder is walked in sorted order. Links to folders are followed, each folder once. Hidden files and folders in it
    (names that begin with a dot) are skipped and counted, and so are pipes, sockets, devices and broken links. A
    pattern such as ``'texts/**/*.md'`` is replaced by its sorted matches. A file that is found twice counts once, so
    that no text gets into both splits. ``-`` is standard input; a pipe that is named itself is read.

    Args:
        inputs: paths and patterns.
        format, text_column: as for :class:`Corpus`.

    Raises:
        DataError: an input does not exist, or a pattern has no match.
    """
    files: dict[str, Path] = {}
    walk = _Walk()
    for given in inputs:
        for path in _matches(given):
            for file in walk.files(path) if path.is_dir() else [path]:
                files.setdefault(os.path.realpath(file), file)
    return Corpus(list(files.values()), walk.num_hidden, walk.left_out, format, text_column)


def standard_library() -> Corpus:
    """Collect the source files of the running Python's standard library, without tests and installed packages.

    Raises:
        DataError: this Python has no source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = [path for path in sorted(root.rglob("*.py")) if left_out.isdisjoint(path.relative_to(root).parts)]
    if not paths:
        raise DataError(f"the standard library of {sys.executable} has no source files in {root}; give your own text")
    return Corpus(paths)


def _matches(given: str | Path) -> list[Path]:
    path = Path(given)
    if str(given) == STANDARD_INPUT or path.exists():
        return [path]
    matches = [Path(match) for match in sorted(glob.glob(str(given), recursive=True))]
    if not matches:
        raise DataError(f"there is no file, folder or match of a pattern {str(given)!r}; check the spelling")
    # '**' also matches folders. Walking them would add files a second time, and files that the pattern excludes.
    return [match for match in matches if match.is_file()] or matches


@dataclass
class _Walk:
    """Collect the visible regular files below folders, and count what is left out.

    Attributes:
        num_hidden: hidden files and folders.
        left_out: what else was left out.
        visited: folders that were entered, by their real paths: links may lead back.
    """

    num_hidden: int = 0
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    visited: set[str] = field(default_factory=set)

    def files(self, root: Path) -> list[Path]:
        """Return the files below a folder, sorted."""
        found: list[Path] = []
        for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
            self.visited.add(os.path.realpath(folder))
            visible = [name for name in folders if not name.startswith(".")]
            self.num_hidden += len(folders) - len(visible) + sum(name.startswith(".") for name in names)
            folders[:] = [name for name in sorted(visible) if self._is_new(os.path.join(folder, name))]
            for name in sorted(names):
                path = Path(folder, name)
                if name.startswith("."):
                    continue
                if path.is_file():
                    found.append(path)
                else:
                    _note(self.left_out, NO_FILE if path.exists() else NO_TARGET, str(path))
        return found

    def _is_new(self, folder: str) -> bool:
        """Say whether a folder was not entered yet; a link to one that is visited, or contains itself, is not new."""
        real = os.path.realpath(folder)
        new = real not in self.visited
        self.visited.add(real)
        return new


def _note(left_out: dict[str, tuple[int, str]], kind: str, name: str) -> None:
    """Count something that is left out."""
    count, first = left_out.get(kind, (0, name))
    left_out[kind] = count + 1, first


def _size(path: Path) -> int:
    """Return the size of a file on the disk, bytes; 0 for pipes and standard input."""
    return path.stat().st_size if path.is_file() else 0


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if str(path) == STANDARD_INPUT:
        if sys.stdin is None:
            raise DataError("standard input is closed; give it text (command | longnet prepare -), or name a file")
        yield sys.stdin.buffer
        return
    if stat.S_ISSOCK(path.stat().st_mode):
        raise DataError(f"{path} is a socket, which is no file to read; give a file, a folder or a pipe")
    with path.open("rb") as file:
        yield file


def _raise(error: OSError) -> None:
    raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}")


def _chunks(name: str, stream: IO[bytes]) -> Iterator[bytes]:
    with _naming(name):
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn read errors into a ``DataError`` that names the file."""
    try:
        yield
    except READ_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{name} cannot be read ({reason}); mend it or leave it out") from error
