"""A token file has a JSON header and one array of token ids, which is memory-mapped.

Layout, little-endian::

    0    magic          8 bytes
    8    version        uint32
    12   header_bytes   uint32: length of the JSON, padded with spaces so that the tokens start on a page
    16   header_sha256  32 bytes
    48   JSON           see Header
    ..   tokens         num_tokens × uint8, uint16 or uint32
    ..   edges          uint64: first token of each document, then num_tokens; files of older versions have none
    ..   answers        uint64: first token and end of each stretch of answers; most files have none

A separator is the last token of the document before it. In a file
with answers these alone are trained and evaluated.
"""

from __future__ import annotations

import hashlib
import os
import struct
import weakref
from bisect import bisect_right
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tqdm import tqdm

from longnet_dist.data.tokenizers import Tokenizer, tokenizer_from_json
from longnet_dist.errors import DataError

MAGIC = b"LONGNET\0"
VERSION = 1
PREAMBLE = struct.Struct("<8sII32s")
PAGE_BYTES = 4096
READ_BYTES = 1 << 24

EDGE_BYTES = 8

SplitName = Literal["train", "validation", "all"]
Count = Annotated[int, Field(ge=0, strict=True)]


class Split(BaseModel):
    """A Split is the tokens ``[first, last)`` of the file, which encode ``num_bytes`` bytes of text.

    Attributes:
        first: index of the first token.
        last: end (exclusive).
        num_bytes: bytes of text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: Count
    last: Count
    num_bytes: Count


class Edges(BaseModel):
    """Edges says how many edges of documents, or of answers, follow the tokens.

    Attributes:
        count: number of edges: one more than the documents with tokens, or two for each stretch of answers.
        sha256: checksum of the edges, hexadecimal.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: Annotated[int, Field(ge=2, strict=True)]
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Header(BaseModel):
    """The Header describes a token file.

    A document separator counts as one byte of text, so that bits per byte can be compared between tokenizers.

    Attributes:
        dtype: dtype of the tokens.
        num_tokens: tokens of the whole file.
        num_documents: documents.
        num_bytes: bytes of text.
        max_id: largest token id.
        sha256: checksum of the tokens, hexadecimal.
        train: the training split.
        validation: the validation split, which follows it.
        source: where the text comes from.
        tokenizer: the tokenizer, for :func:`~longnet_dist.data.tokenizers.tokenizer_from_json`.
        edges: the edges of the documents; None in files of older versions.
        answers: the edges of the stretches of answers; None if the file has none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["uint8", "uint16", "uint32"]
    num_tokens: Count
    num_documents: Count
    num_bytes: Count
    max_id: Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    train: Split
    validation: Split
    source: str
    tokenizer: dict[str, Any]
    edges: Edges | None = None
    answers: Edges | None = None

    @property
    def token_bytes(self) -> int:
        """Return the size of all tokens, bytes."""
        return self.num_tokens * np.dtype(self.dtype).itemsize

    @property
    def data_bytes(self) -> int:
        """Return the size of all that follows the header, bytes."""
        return self.token_bytes + _edge_bytes(self.edges) + _edge_bytes(self.answers)

    @model_validator(mode="after")
    def _splits_cover_the_file(self) -> Self:
        edges = (0, self.train.last, self.train.last, self.num_tokens)
        if (self.train.first, self.train.last, self.validation.first, self.validation.last) != edges:
            raise ValueError("train and validation must be the two parts of [0, num_tokens)")
        if self.train.last > self.num_tokens:
            raise ValueError("train ends behind num_tokens")
        if self.train.num_bytes + self.validation.num_bytes != self.num_bytes:
            raise ValueError("the bytes of train and validation must add up to num_bytes")
        if self.max_id > np.iinfo(self.dtype).max:
            raise ValueError("max_id does not fit dtype")
        return self


class TokenFile:
    """A TokenFile is a token file opened for reading; :meth:`open` makes one.

    Attributes:
        path: path of the file.
        header: its header.
        tokens: (num_tokens,) uint8, uint16 or uint32, memory-mapped and read-only.
        edges: (count,) uint64, the first token of each document and the end of the last, memory-mapped and read-only;
            None in files of older versions.
        answers: (count,) uint64, the first token and the end of each stretch of answers, memory-mapped and read-only;
            None if the file has none.
    """

    def __init__(self, path: Path, header: Header, offset: int) -> None:
        self.path = path
        self.header = header
        self._offset = offset
        # The open file is the one that is mapped, whatever happens to its name.
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self._stamp = _stamp(self._descriptor)
        self.tokens: npt.NDArray[np.unsignedinteger[Any]] = np.memmap(
            path, dtype=header.dtype, mode="r", offset=offset, shape=(header.num_tokens,)
        )
        place = offset + header.token_bytes
        self.edges = self._map_edges(header.edges, place)
        self.answers = self._map_edges(header.answers, offset + header.data_bytes - _edge_bytes(header.answers))

    def _map_edges(self, edges: Edges | None, place: int) -> npt.NDArray[np.uint64] | None:
        return np.memmap(self.path, dtype="<u8", mode="r", offset=place, shape=(edges.count,)) if edges else None

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> TokenFile:
        """Map the token file at ``path`` after checking its header and length.

        Args:
            path: a file that ``longnet prepare`` wrote.
            verify: also compare the checksum of all tokens, which reads the whole file.

        Raises:
            DataError: no such file, another format, a newer version, a damaged header, a wrong length or checksum.
        """
        path = Path(path)
        if path.is_dir():
            raise DataError(
                f"{path} is a folder, not a token file; turn its text into one with: longnet prepare {path} --output "
                f"{path}.tokens"
            )
        if not path.is_file():
            raise DataError(f"there is no token file {path}; make it with: longnet prepare INPUT --output {path}")
        try:
            with path.open("rb") as stream:
                header, offset = _read_header(path, stream)
                _check_length(path, header, offset)
                if verify:
                    _check_tokens(path, header, stream)
            return cls(path, header, offset)
        except OSError as error:
            raise DataError(f"the token file {path} cannot be read: {error.strerror or error}") from error

    @property
    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer that encoded the file."""
        return tokenizer_from_json(self.header.tokenizer)

    def split(self, name: SplitName) -> tuple[int, int]:
        """Return ``(first, last)``: the split has the tokens ``[first, last)``.

        Raises:
            DataError: there is no such split.
        """
        split = self._split(name)
        return split.first, split.last

    def check_size(self) -> None:
        """Check that the file is as long as it was, before the map is read: behind its end a read kills the process.

        Raises:
            DataError: the file was truncated.
        """
        expected, actual = self._offset + self.header.data_bytes, os.fstat(self._descriptor).st_size
        if actual < expected:
            raise self._changed(f"it was truncated from {expected} to {actual} bytes")

    def check_unchanged(self) -> None:
        """Check that the mapped file is what was opened, and that its name still leads to the same content.

        Where only its time of change is another one, its checksums are compared, which reads the whole file.

        Raises:
            DataError: the file was truncated or overwritten, or another file took its place.
        """
        self.check_size()
        stamp = _stamp(self._descriptor)
        if stamp != self._stamp:
            with open(os.dup(self._descriptor), "rb") as stream:
                stream.seek(0)
                self._check_same_header(stream)
                try:
                    _check_tokens(self.path, self.header, stream)
                except DataError as error:
                    raise self._changed("its tokens were overwritten") from error
            self._stamp = stamp
        if self.path.exists() and not os.path.samestat(self.path.stat(), os.fstat(self._descriptor)):
            with self.path.open("rb") as stream:
                self._check_same_header(stream)

    def _check_same_header(self, stream: BinaryIO) -> None:
        try:
            header, _ = _read_header(self.path, stream)
        except DataError as error:
            raise self._changed("it is no whole token file any more") from error
        if header != self.header:
            raise self._changed("another token file took its place")

    def _changed(self, what: str) -> DataError:
        return DataError(
            f"the token file {self.path} has changed since it was opened: {what}; give the old file back, and go on "
            "from a checkpoint that was written before"
        )

    def require_edges(self) -> None:
        """Check that the file has the edges of its documents.

        Raises:
            DataError: an older version wrote the file, without edges, or they are damaged.
        """
        if self.edges is None:
            raise DataError(
                f"data.documents=true needs the edges of documents, but {self.path} has none, because an older version "
                f"prepared it; prepare it again: longnet prepare INPUT --output {self.path} --overwrite"
            )
        if (self.edges[0], self.edges[-1]) != (0, self.header.num_tokens):
            raise self._damaged_edges()

    def edges_inside(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Return the edges of documents in ``(first, last]``, ascending, (n,) int64.

        Raises:
            DataError: the file has no edges, or they are damaged.
        """
        self.require_edges()
        assert self.edges is not None
        found = _inside(self.edges, first, last)
        if np.any(np.diff(found, prepend=first, append=max(last, first) + 1) < 1):
            raise self._damaged_edges()
        return found

    def is_answer(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Say which of the tokens ``[first, last)`` are answers, ``(last - first,)``.

        Raises:
            DataError: the stretches of answers are damaged.
        """
        assert self.answers is not None
        edges = _inside(self.answers, first, last - 1)
        if np.any(np.diff(edges, prepend=first, append=max(last, first + 1)) < 1):
            raise DataError(
                f"the answers in {self.path} are damaged: they must rise; copy it again or prepare it again"
            )
        # Between a first token and an end the number of edges at or before a token is odd.
        before = bisect_right(self.answers, first)
        steps = np.zeros(last - first, np.int64)
        steps[edges - first] = 1
        found: npt.NDArray[np.bool_] = (before + np.cumsum(steps)) % 2 == 1
        return found

    def _damaged_edges(self) -> DataError:
        return DataError(
            f"the edges of documents in {self.path} are damaged: they must rise from 0 to {self.header.num_tokens}; "
            "copy it again or prepare it again"
        )

    def bytes_per_token(self, name: SplitName) -> float:
        """Return the bytes of text for each token, averaged over the split.

        With it, ``bits per byte = loss / ln 2 / bytes_per_token``.

        Raises:
            DataError: there is no such split, or it is empty.
        """
        split = self._split(name)
        if split.first == split.last:
            raise DataError(f"the {name} split of {self.path} is empty; prepare it with another --validation fraction")
        return split.num_bytes / (split.last - split.first)

    def _split(self, name: SplitName) -> Split:
        header = self.header
        splits = {
            "train": header.train,
            "validation": header.validation,
            "all": Split(first=0, last=header.num_tokens, num_bytes=header.num_bytes),
        }
        if name not in splits:
            raise DataError(f"a token file has the splits train, validation and all, not {name!r}")
        return splits[name]


def _edge_bytes(edges: Edges | None) -> int:
    return edges.count * EDGE_BYTES if edges else 0


def _inside(edges: npt.NDArray[np.uint64], first: int, last: int) -> npt.NDArray[np.int64]:
    """Return the edges in ``(first, last]``."""
    # Bisection reads a few pages of the map, where numpy's search would copy the unaligned array whole.
    begin, end = bisect_right(edges, first), bisect_right(edges, last)
    return np.array(edges[begin:end]).astype(np.int64)


def _stamp(descriptor: int) -> tuple[int, int]:
    """Return size and time of change of an open file."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _read_header(path: Path, stream: BinaryIO) -> tuple[Header, int]:
    """Read the header; return it and the offset of the first token in bytes."""
    again = "prepare it again with longnet prepare"
    preamble = stream.read(PREAMBLE.size)
    if preamble[: len(MAGIC)] != MAGIC[: len(preamble)] or not preamble:
        raise DataError(
            f"{path} is not a token file (it begins with {preamble[:8]!r}); turn text into one with: "
            f"longnet prepare {path} --output FILE.tokens"
        )
    if len(preamble) < PREAMBLE.size:
        raise DataError(f"the token file {path} is truncated: it ends after {len(preamble)} bytes; {again}")
    _, version, header_bytes, digest = PREAMBLE.unpack(preamble)
    if version > VERSION:
        raise DataError(
            f"the token file {path} has format version {version}, this longnet_dist reads up to {VERSION}; "
            f"update longnet_dist or {again}"
        )
    text = stream.read(header_bytes)
    if len(text) < header_bytes:
        raise DataError(f"the token file {path} is truncated inside its header; {again}")
    if hashlib.sha256(text).digest() != digest:
        raise DataError(f"the header of the token file {path} is damaged (its checksum differs); {again}")
    try:
        return Header.model_validate_json(text), PREAMBLE.size + header_bytes
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "JSON"
        raise DataError(f"the header of the token file {path} is wrong at {place}: {first['msg']}; {again}") from error


def _check_length(path: Path, header: Header, offset: int) -> None:
    if header.num_tokens == 0:
        raise DataError(f"the token file {path} holds no tokens; prepare it again from some text")
    expected = offset + header.data_bytes
    actual = path.stat().st_size
    if actual != expected:
        fault = "truncated" if actual < expected else "too long"
        raise DataError(
            f"the token file {path} is {fault}: its header promises {expected} bytes and it has {actual}; "
            "copy it again or prepare it again"
        )


def _check_tokens(path: Path, header: Header, stream: BinaryIO) -> None:
    """Compare the checksums of everything behind the header, where ``stream`` is positioned."""
    parts = [("tokens", header.token_bytes, header.sha256)]
    for what, edges in (("edges of documents", header.edges), ("answers", header.answers)):
        if edges:
            parts.append((what, _edge_bytes(edges), edges.sha256))
    total = header.data_bytes
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"verify {path.name}", delay=1, leave=False) as progress:
        for what, size, promised in parts:
            digest = hashlib.sha256()
            while size and (chunk := stream.read(min(READ_BYTES, size))):
                digest.update(chunk)
                size -= len(chunk)
                progress.update(len(chunk))
            if digest.hexdigest() != promised:
                raise DataError(
                    f"the {what} of {path} are damaged: their SHA-256 is {digest.hexdigest()}, the header promises "
                    f"{promised}; copy it again or prepare it again"
                )
