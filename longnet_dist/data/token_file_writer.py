"""A token file is written in one pass over the text, whatever its size."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from longnet_dist.data.token_file import MAGIC, PAGE_BYTES, PREAMBLE, VERSION, Edges, Header, Split
from longnet_dist.data.tokenizers import Ids, Tokenizer, split_at_lines
from longnet_dist.errors import DataError

NUMBERS_BYTES = 1024  # reserved for the header's numbers, which are known only at the end
SPLIT_SEARCH_TOKENS = 8  # a UTF-8 character has at most four bytes, so its tokens end within a few


class TokenFileWriter:
    """A TokenFileWriter streams documents into a token file, which appears under its name only when it is complete.

    It is a context manager: leaving the block completes the file, an exception removes what was written. It needs
    memory for one piece of 256 KiB, 16 bytes for every piece and 8 for every document.

    Args:
        path: the file to write; missing parent folders are created.
        tokenizer: encodes the text; its ``vocab_size`` decides between uint8, uint16 and uint32.
        validation: share of the tokens, at the end of the file, for the validation split, in [0, 1).
        overwrite: replace an existing file.
        source: description of the text, for the header.

    Attributes:
        num_documents, num_tokens, num_bytes: counts so far; a separator counts as one byte.
        num_replaced: byte sequences that are not UTF-8 and were read as U+FFFD, with tokenizers that need text.
        header: the header, after the block was left.

    Raises:
        DataError: ``path`` exists and ``overwrite`` is False, it cannot be written, or no document had any text.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        *,
        validation: float = 0.05,
        overwrite: bool = False,
        source: str = "",
    ) -> None:
        if not 0 <= validation < 1:
            raise DataError(f"validation is a share of the tokens in [0, 1), not {validation}; 0.05 is usual")
        self.path = Path(path)
        self.tokenizer = tokenizer
        self.num_documents = self.num_tokens = self.num_bytes = self.num_replaced = 0
        self.header: Header | None = None
        self._validation = validation
        self._overwrite = overwrite
        self._source = source
        self._max_id = 0
        self._dtype = np.dtype(np.min_scalar_type(tokenizer.vocab_size - 1)).newbyteorder("<")
        self._digest = hashlib.sha256()
        self._edges = array("q"), array("q")  # first token, first byte of every piece
        self._documents = array("Q", [0])  # first token of every document
        self._refuse_existing()
        self._offset = self._data_offset()

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # In the same folder, so that the last rename is atomic; hidden, so that no corpus walk picks it up.
            self._partial = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.partial")
            self._stream = self._partial.open("x+b")
        except OSError as error:
            raise self._unwritable(error) from error
        self._stream.seek(self._offset)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as fault:
            raise self._unwritable(fault) from fault
        finally:
            with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
                self._stream.close()
            self._partial.unlink(missing_ok=True)

    def add_document(self, chunks: Iterable[bytes]) -> None:
        """Append one document; an empty one is left out.

        Args:
            chunks: the text as bytes, in chunks of any size.
        """
        begun = False
        for piece in split_at_lines(chunks):
            if not begun and self.num_documents and self.tokenizer.document_separator is not None:
                self._append(np.array([self.tokenizer.document_separator]), num_bytes=1)
            if not begun and self.num_tokens > self._documents[-1]:
                self._documents.append(self.num_tokens)
            begun = True
            if self.tokenizer.text_only:
                self.num_replaced += _count_undecodable(piece)
            self._append(self.tokenizer.encode(piece), len(piece))
        self.num_documents += begun

    def _append(self, ids: Ids, num_bytes: int) -> None:
        tokens, first_bytes = self._edges
        tokens.append(self.num_tokens)
        first_bytes.append(self.num_bytes)
        data = ids.astype(self._dtype, copy=False).tobytes()
        try:
            self._stream.write(data)
        except OSError as error:
            raise self._unwritable(error) from error
        self._digest.update(data)
        self._max_id = max(self._max_id, int(ids.max(initial=0)))
        self.num_tokens += len(ids)
        self.num_bytes += num_bytes

    def _finish(self) -> None:
        if self.num_tokens == 0:
            raise DataError(f"no text was found for {self.path}: {self.num_documents} documents gave no token")
        self._refuse_existing()
        token, byte = self._boundary(self.num_tokens - int(self.num_tokens * self._validation))
        self.header = self._make_header(token, byte, self._write_edges())
        text = self.header.model_dump_json().encode().ljust(self._offset - PREAMBLE.size)
        self._stream.seek(0)
        self._stream.write(PREAMBLE.pack(MAGIC, VERSION, len(text), hashlib.sha256(text).digest()) + text)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        os.replace(self._partial, self.path)

    def _write_edges(self) -> Edges:
        """Write the edges of the documents behind the last token."""
        edges = np.frombuffer(self._documents, np.uint64)
        edges = np.append(edges[edges < self.num_tokens], np.uint64(self.num_tokens)).astype("<u8")
        self._stream.seek(self._offset + self.num_tokens * self._dtype.itemsize)
        self._stream.write(edges.tobytes())
        return Edges(count=len(edges), sha256=hashlib.sha256(edges.tobytes()).hexdigest())

    def _boundary(self, target: int) -> tuple[int, int]:
        """Return the first token of the validation split, near ``target``, and the exact offset of its text in bytes.

        Inside a piece the offset is found by decoding. A tokenizer that normalises does not return as many bytes as it
        was given; then the split is at the nearer edge of the piece, whose offset is known.
        """
        tokens, first_bytes = self._edges
        index = bisect_right(tokens, target) - 1
        low = (tokens[index], first_bytes[index])
        is_last = index + 1 == len(tokens)
        high = (self.num_tokens, self.num_bytes) if is_last else (tokens[index + 1], first_bytes[index + 1])
        if target in (low[0], high[0]):
            return low if target == low[0] else high
        ids = self._read_tokens(*low[:1], high[0])
        for token in range(target, min(target + SPLIT_SEARCH_TOKENS, high[0])):
            head = len(self.tokenizer.decode(ids[: token - low[0]]))
            tail = len(self.tokenizer.decode(ids[token - low[0] :]))
            if head + tail == high[1] - low[1]:
                return token, low[1] + head
        return low if target - low[0] <= high[0] - target else high

    def _read_tokens(self, first: int, last: int) -> Ids:
        self._stream.flush()
        self._stream.seek(self._offset + first * self._dtype.itemsize)
        return np.frombuffer(self._stream.read((last - first) * self._dtype.itemsize), dtype=self._dtype)

    def _make_header(self, token: int, byte: int, edges: Edges | None = None) -> Header:
        return Header(
            dtype=cast(Any, self._dtype.name),
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            num_bytes=self.num_bytes,
            max_id=self._max_id,
            sha256=self._digest.hexdigest(),
            train=Split(first=0, last=token, num_bytes=byte),
            validation=Split(first=token, last=self.num_tokens, num_bytes=self.num_bytes - byte),
            source=self._source,
            tokenizer=self.tokenizer.to_json(),
            edges=edges,
        )

    def _data_offset(self) -> int:
        """Return where the tokens start: on a page, after the header with space for its final numbers."""
        reserved = PREAMBLE.size + len(self._make_header(0, 0).model_dump_json().encode()) + NUMBERS_BYTES
        return -(-reserved // PAGE_BYTES) * PAGE_BYTES

    def _refuse_existing(self) -> None:
        if self.path.is_dir():
            raise DataError(f"the output {self.path} is a folder; name a file in it")
        if self.path.exists() and not self._overwrite:
            raise DataError(f"{self.path} exists and is not overwritten; choose another name or say --overwrite")

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(f"the token file {self.path} cannot be written: {error.strerror or error}")


def _count_undecodable(piece: bytes) -> int:
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        return piece.decode("utf-8", errors="replace").count("\ufffd") - piece.count("\ufffd".encode())
    return 0
