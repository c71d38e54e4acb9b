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

FRAME_PART_BYTES = 1 << 13  # decompressed at once: 128 KiB of text need as little as 4 bytes


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
    """Read a Zstandard file of one frame or several; errors are those of the other compressions.

    The stream reader of zstandard takes a file that ends within a frame for a whole one, so frames are read one by one.
    """

    def __init__(self, file: BinaryIO) -> None:
        require_extra("data", "a .zst file", only="zstandard")
        import zstandard

        self._file, self._error = file, zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None  # None between two frames
        self._ahead = b""  # read, and behind the end of a frame
        self._text = memoryview(b"")  # decompressed, and not given out

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer."""
        while not self._text:
            data = self._ahead or self._file.read(FRAME_PART_BYTES)
            if not data and self._frame is None:
                return 0
            if not data:
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            self._frame = self._frame or self._new_frame()
            try:
                self._text = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise OSError(str(error)) from error
            self._ahead = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size


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
