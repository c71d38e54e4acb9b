"""Documents of files, folders, globs and archives, streamed one after the other."""

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
HEAD_BYTES = 8192  # the part of a file that decides whether it is text, as in git and grep
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
# All that a damaged or encrypted file raises; zipfile says RuntimeError for a password.
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
    """One text; its chunks are read while the corpus stands on it, before the next document is asked for."""

    name: str
    chunks: Iterable[bytes]


@dataclass
class Corpus:
    """Iterates over the documents of files, in the order given, without holding any of them in memory.

    A ``.zip`` or tar archive (also .gz, .xz, .bz2) gives a document for each of its files, in its own order; a ``.gz``,
    ``.xz`` or ``.bz2`` file gives one document; any other file is one document. An archive inside an archive is not
    opened. A file with a zero byte in its first 8 KiB is taken for binary and skipped; a file with no bytes at all is
    left out.

    Args:
        paths: regular files, see ``find_files``.
        num_hidden: what ``find_files`` left out; archive members are added.

    Attributes:
        num_hidden, num_binary: skipped so far.
        total_bytes: size of all files as they lie on the disk.
        bytes_read: how far into ``total_bytes`` the reading has come.

    Raises:
        DataError: while iterating, a file that cannot be read or an archive that is damaged or encrypted.
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
        """Every text stream that the file holds, by name."""
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
    """Where tarfile takes a damaged header behind the first file for the end of the archive, this one raises."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"damaged archive: {error}") from error


def find_corpus(inputs: Iterable[str | Path]) -> Corpus:
    """The corpus of files, folders and globs, each in the order given.

    A folder is walked in sorted order, without following links to folders; what is hidden in it (a name that begins
    with a dot) is skipped and counted. A pattern such as ``'texts/**/*.md'`` stands for its sorted matches. A file that
    is met twice counts once, so that no text lies in both splits.

    Raises:
        DataError: an input that does not exist or a pattern without a match.
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
    """The source text of the running Python's standard library, sorted, without its tests and installed packages."""
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
    # A folder that '**' matches would bring its files a second time, and those that the pattern excludes.
    return [match for match in matches if match.is_file()] or matches


def _walk(root: Path) -> tuple[list[Path], int]:
    """The visible regular files below a folder, sorted, and the number of hidden files and folders."""
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
    """Say which file could not be read."""
    try:
        yield
    except READ_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{name} cannot be read ({reason}); mend it or leave it out") from error
