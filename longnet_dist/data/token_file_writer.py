"""A token file is written in one pass over the text, whatever its size."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from longnet_dist.data.encoding.pieces import Batch, Encoded
from longnet_dist.data.encoding.workers import encoding_by
from longnet_dist.data.shuffle import permuted
from longnet_dist.data.token_file import MAGIC, PAGE_BYTES, PREAMBLE, VERSION, Edges, Header, Split
from longnet_dist.data.tokenizers import PIECE_BYTES, Ids, Tokenizer, split_at_lines
from longnet_dist.errors import DataError

Integers = np.ndarray[Any, np.dtype[np.int64]]

NUMBERS_BYTES = 1024  # reserved for the header's numbers, which are known only at the end
SPLIT_SEARCH_TOKENS = 8  # a UTF-8 character has at most four bytes, so its tokens end within a few


class TokenFileWriter:
    """A TokenFileWriter streams documents into a token file, which appears under its name only when it is complete.

    It is a context manager: leaving the block completes the file, an exception removes what was written. It needs
    memory for two batches of 256 KiB a worker, 16 bytes for every piece and 8 for every document.

    Args:
        path: the file to write; missing parent folders are created.
        tokenizer: encodes the text; its ``vocab_size`` decides between uint8, uint16 and uint32.
        validation: share of the tokens, at the end of the file, for the validation split, in [0, 1).
        overwrite: replace an existing file.
        source: description of the text, for the header.
        num_workers: processes that tokenize; the file does not depend on their number.
        shuffle: seed that shuffles the documents before the split, which is then between two documents; this writes
            the tokens twice. None: the documents keep their order.

    Attributes:
        num_documents: documents with text so far.
        num_tokens: tokens that are encoded so far.
        num_bytes: bytes of text that these stand for; a separator counts as one byte.
        num_read: bytes of readable text in them.
        num_lost: bytes among these that no token stands for, because the tokenizer drops them.
        num_replaced: byte sequences that are not UTF-8 and were read as U+FFFD, with tokenizers that need text.
        header: the header, after the block was left.

    Raises:
        DataError: ``path`` exists and ``overwrite`` is False, it cannot be written, no document had any text, or there
            are too few tokens for a validation split.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        *,
        validation: float = 0.05,
        overwrite: bool = False,
        source: str = "",
        num_workers: int = 1,
        shuffle: int | None = None,
    ) -> None:
        if not 0 <= validation < 1:
            raise DataError(f"validation is a share of the tokens in [0, 1), not {validation}; 0.05 is usual")
        if shuffle is not None and not 0 <= shuffle < 2**64:
            raise DataError(f"the seed of the shuffle is from 0 to 2^64 - 1, not {shuffle}; use 0")
        self.path = Path(path)
        self.tokenizer = tokenizer
        self.num_documents = self.num_tokens = self.num_bytes = 0
        self.num_read = self.num_lost = self.num_replaced = 0
        self.header: Header | None = None
        self._validation = validation
        self._overwrite = overwrite
        self._source = source
        self._num_workers = num_workers
        self._shuffle = shuffle
        self._max_id = 0
        self._dtype = np.dtype(np.min_scalar_type(tokenizer.vocab_size - 1)).newbyteorder("<")
        self._digest = hashlib.sha256()
        self._edges = array("q"), array("q")  # first token, first byte of every piece
        self._documents = array("q")  # first token of every document
        self._answers = array("q")  # first token and end of every stretch of answers
        self._batch, self._batch_bytes = Batch([], [], []), 0
        refuse_existing(self.path, self._overwrite)
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
        try:
            self._encoding = encoding_by(self.tokenizer, self._dtype.str, self._num_workers)
        except BaseException:
            self._stream.close()
            self._partial.unlink()
            raise
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
            self._encoding.close()
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
            has_separator = self.tokenizer.document_separator is not None
            self._batch.pieces.append(piece)
            self._batch.begins.append(not begun)
            self._batch.separated.append(not begun and self.num_documents > 0 and has_separator)
            self._batch_bytes += len(piece)
            self.num_documents += not begun
            begun = True
            if self._batch_bytes >= PIECE_BYTES:
                self._pass_on()

    def add_answers(self, first: int, last: int) -> None:
        """Say that tokens ``[first, last)`` of the file are answers; stretches come in order.

        Raises:
            DataError: the stretch is empty, touches the one before it, or documents are shuffled.
        """
        before = self._answers[-1] if self._answers else 0
        if self._shuffle is not None or not before < first < last:
            raise DataError(
                f"answers are stretches of tokens in order, with a token before each, in a file that is not shuffled; "
                f"tokens {first} to {last - 1} after token {before} are none"
            )
        self._answers.extend((first, last))

    def flush(self) -> None:
        """Encode and write all that was added."""
        if self._batch.pieces:
            self._pass_on()
        self._append_all(self._encoding.finish())

    def _pass_on(self) -> None:
        """Let the batch be encoded, and write what is encoded by now."""
        batch, self._batch, self._batch_bytes = self._batch, Batch([], [], []), 0
        self._append_all(self._encoding.put(batch))

    def _append_all(self, results: Iterator[tuple[Batch, Encoded]]) -> None:
        for batch, encoded in results:
            self._append(batch, encoded)

    def _append(self, batch: Batch, encoded: Encoded) -> None:
        try:
            self._stream.write(encoded.tokens)
        except OSError as error:
            raise self._unwritable(error) from error
        self._digest.update(encoded.tokens)
        ends, byte_ends = np.cumsum(encoded.num_tokens), np.cumsum(encoded.num_bytes)
        firsts = self.num_tokens + ends - encoded.num_tokens
        tokens, first_bytes = self._edges
        tokens.frombytes(firsts.tobytes())
        first_bytes.frombytes((self.num_bytes + byte_ends - encoded.num_bytes).tobytes())
        # A separator is the last token of the document before it.
        self._documents.frombytes((firsts + np.array(batch.separated, np.int64))[batch.begins].tobytes())
        self._max_id = max(self._max_id, encoded.max_id)
        self.num_tokens += int(ends[-1])
        self.num_bytes += int(byte_ends[-1])
        self.num_read += encoded.num_read
        self.num_lost += encoded.num_lost
        self.num_replaced += encoded.num_replaced

    def _finish(self) -> None:
        self.flush()
        if self.num_tokens == 0:
            raise DataError(f"no text was found for {self.path}: {self.num_documents} documents gave no token")
        refuse_existing(self.path, self._overwrite)
        edges = np.unique(np.append(np.frombuffer(self._documents, np.int64), self.num_tokens))
        if self._shuffle is not None:
            edges = self._shuffled(edges, self._shuffle)
        token, byte = self._boundary(self._target(), edges)
        end = self._offset + self.num_tokens * self._dtype.itemsize
        edges_of_documents, answers = self._write_edges(edges, end), None
        if self._answers:
            answers = self._write_edges(np.frombuffer(self._answers, np.int64), self._stream.tell())
        self.header = self._make_header(token, byte, edges_of_documents, answers)
        left_out = None if answers else {"answers"}  # which older versions do not know
        text = self.header.model_dump_json(exclude=left_out).encode().ljust(self._offset - PREAMBLE.size)
        self._stream.seek(0)
        self._stream.write(PREAMBLE.pack(MAGIC, VERSION, len(text), hashlib.sha256(text).digest()) + text)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        os.replace(self._partial, self.path)

    def _write_edges(self, edges: Integers, place: int) -> Edges:
        """Write edges at a place of the file."""
        data = edges.astype("<u8").tobytes()
        self._stream.seek(place)
        self._stream.write(data)
        return Edges(count=len(edges), sha256=hashlib.sha256(data).hexdigest())

    def _shuffled(self, edges: Integers, seed: int) -> Integers:
        """Write the tokens again, document by document in random order; return the edges."""
        separator = self.tokenizer.document_separator
        end = np.array([] if separator is None else [separator], self._dtype)
        token_bytes, before = self.tokenizer.token_bytes(), self._partial
        self._stream.flush()
        tokens = np.memmap(before, self._dtype, "r", self._offset, (self.num_tokens,))
        self._partial = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.partial")
        old, self._stream = self._stream, self._partial.open("x+b")
        try:
            self._stream.seek(self._offset)
            self._digest = hashlib.sha256()
            self._edges = array("q"), array("q")
            self.num_tokens = self.num_bytes = 0
            order = permuted(np.arange(len(edges) - 1), len(edges) - 1, seed)
            for place, number in enumerate(order.tolist()):
                ids = np.asarray(tokens[edges[number] : edges[number + 1]])
                if number < len(order) - 1 and separator is not None:
                    ids = ids[:-1]  # its separator
                if place < len(order) - 1:
                    ids = np.concatenate([ids, end])
                data = ids.tobytes()
                self._stream.write(data)
                self._digest.update(data)
                self._edges[0].append(self.num_tokens)
                self._edges[1].append(self.num_bytes)
                self.num_tokens += len(ids)
                self.num_bytes += int(token_bytes[ids].sum())
        finally:
            del tokens
            old.close()
            before.unlink()
        return np.unique(np.append(np.frombuffer(self._edges[0], np.int64), self.num_tokens))

    def _target(self) -> int:
        """Return the token at which the validation split should begin; no split is empty unless that is wanted.

        Raises:
            DataError: there are not enough tokens for two splits.
        """
        if not self._validation:
            return self.num_tokens
        if self.num_tokens < 2:
            raise DataError(
                f"{self.path} would have {self.num_tokens} token, which cannot be shared between training and "
                f"validation; give more text, or --validation 0 for no validation split"
            )
        least = 2 if self.num_tokens > 3 else 1  # a label needs a token before it
        return min(max(self.num_tokens - int(self.num_tokens * self._validation), least), self.num_tokens - least)

    def _boundary(self, target: int, edges: Integers) -> tuple[int, int]:
        """Return the first token of the validation split, near ``target``, and the bytes before it.

        Shuffled documents are not split. Else the split is between two tokens, and not inside a character where one of
        the next tokens ends it.
        """
        if self._shuffle is not None and self._validation and len(edges) > 2:
            target = int(edges[1:-1][np.abs(edges[1:-1] - target).argmin()])
        tokens, first_bytes = self._edges
        index = bisect_right(tokens, target) - 1
        first, byte = tokens[index], first_bytes[index]
        if target in (first, self.num_tokens):
            return (target, byte) if target == first else (self.num_tokens, self.num_bytes)
        ids = self._read_tokens(first, tokens[index + 1] if index + 1 < len(tokens) else self.num_tokens)
        token = first + self._between_characters(ids, target - first)
        return token, byte + int(self.tokenizer.token_bytes()[ids[: token - first]].sum())

    def _between_characters(self, ids: Ids, target: int) -> int:
        """Return the first place from ``target`` on at which a split leaves no more broken characters than there are.

        Near it are the tokens of one character, of at most four bytes; so only a few tokens are decoded.
        """

        def broken(part: Ids) -> int:
            return self.tokenizer.decode(part).decode("utf-8", errors="replace").count("\ufffd")

        if not self.tokenizer.text_only:
            return target
        low, high = max(target - SPLIT_SEARCH_TOKENS, 0), target + 2 * SPLIT_SEARCH_TOKENS
        for place in range(target, min(target + SPLIT_SEARCH_TOKENS, len(ids) - 1)):
            if broken(ids[low:place]) + broken(ids[place:high]) <= broken(ids[low:high]):
                return place
        return target

    def _read_tokens(self, first: int, last: int) -> Ids:
        self._stream.flush()
        self._stream.seek(self._offset + first * self._dtype.itemsize)
        return np.frombuffer(self._stream.read((last - first) * self._dtype.itemsize), dtype=self._dtype)

    def _make_header(self, token: int, byte: int, edges: Edges | None = None, answers: Edges | None = None) -> Header:
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
            answers=answers,
        )

    def _data_offset(self) -> int:
        """Return where the tokens start: on a page, after the header with space for its final numbers."""
        reserved = PREAMBLE.size + len(self._make_header(0, 0).model_dump_json().encode()) + NUMBERS_BYTES
        return -(-reserved // PAGE_BYTES) * PAGE_BYTES

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(f"the token file {self.path} cannot be written: {error.strerror or error}")


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Refuse to write a token file where something else is.

    Raises:
        DataError: ``path`` is a folder, a device or a pipe, or a file that may not be overwritten.
    """
    if path.is_dir():
        raise DataError(f"the output {path} is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise DataError(f"the output {path} is a device or a pipe, which a token file would replace; name a file")
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists and is not overwritten; choose another name or say --overwrite")
