"""Compressed files are read as streams."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import IO, Any, BinaryIO, cast

from longnet_dist.extras import require_extra


class Counting(io.RawIOBase):
    """Count what is read of a file, which may be a pipe; it seeks where the file does.

    Attributes:
        num_read: bytes up to the present place.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_read = 0

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say whether the file seeks."""
        return self._file.seekable()

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes."""
        data = self._file.read(size)
        self.num_read += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place."""
        self.num_read = self._file.seek(offset, whence)
        return self.num_read

    def tell(self) -> int:
        """Return the present place."""
        return self._file.tell()


class _Zstandard(io.RawIOBase):
    """Read a Zstandard file with errors of the operating system, as the other compressions raise."""

    def __init__(self, file: BinaryIO) -> None:
        require_extra("data", "a .zst file", only="zstandard")
        import zstandard

        self._error = zstandard.ZstdError
        self._stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True, closefd=False)

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer."""
        try:
            return int(self._stream.readinto(buffer))
        except self._error as error:
            raise OSError(str(error)) from error


DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": lambda file: io.BufferedReader(_Zstandard(file), 1 << 17),
}


def without_compression(name: str) -> str:
    """Return a name without the suffix of a compression."""
    suffix = PurePath(name).suffix
    return name[: -len(suffix)] if suffix.lower() in DECOMPRESSORS else name


@contextlib.contextmanager
def decompressed(name: str, file: BinaryIO) -> Iterator[IO[bytes]]:
    """Open the stream of a file that may be compressed, which its name says."""
    opener = DECOMPRESSORS.get(PurePath(name).suffix.lower())
    if opener is None:
        yield file
        return
    with opener(file) as stream:
        yield cast(IO[bytes], stream)
