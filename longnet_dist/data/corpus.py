"""A corpus streams the documents of files, folders, globs and archives, one after the other."""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import lzma
import os
import sys
import sysconfig
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO, Self

from longnet_dist.errors import DataError

CHUNK_BYTES = 1 << 20
HEAD_BYTES = 8192  # a zero byte in this part makes a file binary, as for git and grep
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
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


@dataclass(frozen=True)
class Document:
    """A Document is one text, in chunks of bytes.

    The chunks are read from the open file of the corpus, so they must be consumed before the next document is taken.

    Attributes:
        name: path of the file, or of the archive and the member.
        chunks: the text, as bytes.
    """

    name: str
    chunks: Iterable[bytes]


@dataclass
class Corpus:
    """A Corpus iterates over the documents of files, in the order given, without loading any of them into memory.

    * A ``.zip`` or tar archive (also ``.tar.gz``, ``.tar.xz``, ``.tar.bz2``) is one document for each file in it, in
      the archive's order. An archive inside an archive is not opened.
    * Any other file is one document; ``.gz``, ``.xz`` and ``.bz2`` files are decompressed.
    * A file with a zero byte in its first 8 KiB is binary and is skipped. An empty file is left out.

    Args:
        paths: regular files, as from :func:`find_corpus`.
        num_hidden: number of hidden files that were skipped when the paths were collected.

    Attributes:
        num_hidden, num_binary: files skipped so far, with archive members.
        total_bytes: size of all files on disk.

    Raises:
        DataError: while iterating: a file cannot be read, or an archive is damaged or encrypted.
    """

    paths: list[Path]
    num_hidden: int = 0
    num_binary: int = field(default=0, init=False)
    total_bytes: int = field(init=False)
    _finished_bytes: int = field(default=0, init=False)
    _file: BinaryIO | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.total_bytes = sum(path.stat().st_size for path in self.paths)

    @property
    def bytes_read(self) -> int:
        """Return how many of the ``total_bytes`` have been read so far."""
        return self._finished_bytes + (self._file.tell() if self._file is not None else 0)

    def __iter__(self) -> Iterator[Document]:
        for path in self.paths:
            with _naming(str(path)), path.open("rb") as self._file:
                for name, stream in self._streams(path, self._file):
                    head = stream.read(HEAD_BYTES)
                    if b"\0" in head:
                        self.num_binary += 1
                    elif head:
                        yield Document(name, chain([head], _chunks(name, stream)))
            self._file = None
            self._finished_bytes += path.stat().st_size

    def _streams(self, path: Path, file: BinaryIO) -> Iterator[tuple[str, IO[bytes]]]:
        """Yield the name and the byte stream of every document in a file."""
        name = path.name.lower()
        if name.endswith(TAR_SUFFIXES):
            yield from self._tar_members(path, file)
        elif name.endswith(".zip"):
            yield from self._zip_members(path, file)
        elif (opener := DECOMPRESSORS.get(path.suffix.lower())) is not None:
            with opener(file) as stream:
                yield str(path), stream
        else:
            yield str(path), file

    def _zip_members(self, path: Path, file: BinaryIO) -> Iterator[tuple[str, IO[bytes]]]:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if not member.is_dir() and not self._skip_hidden(member.filename):
                    with archive.open(member) as stream:
                        yield f"{path}/{member.filename}", stream

    def _tar_members(self, path: Path, file: BinaryIO) -> Iterator[tuple[str, IO[bytes]]]:
        with tarfile.open(fileobj=file, mode="r|*", tarinfo=_StrictTarInfo) as archive:
            for member in archive:
                if member.isfile() and not self._skip_hidden(member.name):
                    stream = archive.extractfile(member)
                    assert stream is not None  # it is a regular file
                    yield f"{path}/{member.name}", stream

    def _skip_hidden(self, member: str) -> bool:
        hidden = any(part.startswith(".") and part not in (".", "..") for part in member.split("/"))
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


def find_corpus(inputs: Iterable[str | Path]) -> Corpus:
    """Collect the files of files, folders and globs, each in the order given.

    A folder is walked in sorted order, without following links to folders. Hidden files and folders in it (names that
    begin with a dot) are skipped and counted. A pattern such as ``'texts/**/*.md'`` is replaced by its sorted matches.
    A file that is found twice counts once, so that no text gets into both splits.

    Args:
        inputs: paths and patterns.

    Raises:
        DataError: an input does not exist, or a pattern has no match.
    """
    files: dict[str, Path] = {}
    num_hidden = 0
    for given in inputs:
        for path in _matches(given):
            found, hidden = _walk(path) if path.is_dir() else ([path], 0)
            num_hidden += hidden
            for file in found:
                files.setdefault(os.path.realpath(file), file)
    return Corpus(list(files.values()), num_hidden)


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
    if path.is_dir() or path.is_file():
        return [path]
    matches = [Path(match) for match in sorted(glob.glob(str(given), recursive=True))]
    if not matches:
        raise DataError(f"there is no file, folder or match of a pattern {str(given)!r}; check the spelling")
    # '**' also matches folders. Walking them would add files a second time, and files that the pattern excludes.
    return [match for match in matches if match.is_file()] or matches


def _walk(root: Path) -> tuple[list[Path], int]:
    """Return the visible regular files below a folder, sorted, and the number of hidden files and folders."""
    files: list[Path] = []
    num_hidden = 0
    for folder, folders, names in os.walk(root, onerror=_raise):
        visible = [name for name in folders if not name.startswith(".")]
        num_hidden += len(folders) - len(visible) + sum(name.startswith(".") for name in names)
        folders[:] = sorted(visible)
        candidates = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        files.extend(path for path in candidates if path.is_file())
    return files, num_hidden


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
