"""Pieces of text are encoded together, and what their tokens stand for is counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longnet_dist.data.tokenizers import Ids, Tokenizer

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """A Batch is some consecutive pieces of text.

    Attributes:
        pieces: the pieces.
        begins: for each, whether it begins a document.
        separated: for each, whether a separator comes before it.
    """

    pieces: list[bytes]
    begins: list[bool]
    separated: list[bool]


@dataclass(frozen=True)
class Encoded:
    """An Encoded is a batch as tokens.

    Attributes:
        tokens: the tokens of all pieces, with separators, in the dtype of the token file.
        num_tokens: (pieces,) tokens of each piece, with its separator.
        num_bytes: (pieces,) bytes of text that they stand for; a separator counts 1.
        num_read: bytes of readable text in the batch.
        num_lost: bytes among them that no token stands for.
        num_replaced: byte sequences that are not UTF-8 and were read as U+FFFD.
        max_id: largest id.
    """

    tokens: bytes
    num_tokens: Integers
    num_bytes: Integers
    num_read: int
    num_lost: int
    num_replaced: int
    max_id: int


class Encoder:
    """An Encoder turns batches into tokens; the result depends on nothing but the batch.

    Args:
        tokenizer: encodes each piece for itself.
        dtype: of the token file.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: str) -> None:
        self._tokenizer = tokenizer
        self._dtype = np.dtype(dtype)
        self._token_bytes = tokenizer.token_bytes()

    def __call__(self, batch: Batch) -> Encoded:
        """Encode a batch."""
        separator = np.array([self._tokenizer.document_separator or 0], self._dtype)
        parts: list[Ids] = []
        num_tokens, num_bytes = np.zeros((2, len(batch.pieces)), np.int64)
        num_read = num_lost = num_replaced = 0
        for number, (piece, separated) in enumerate(zip(batch.pieces, batch.separated, strict=True)):
            replaced, readable = _readable(piece) if self._tokenizer.text_only else (0, len(piece))
            ids = self._tokenizer.encode(piece)
            covered = int(self._token_bytes[ids].sum())
            num_replaced += replaced
            num_read += readable
            num_lost += max(0, readable - covered)
            num_tokens[number], num_bytes[number] = len(ids) + separated, covered + separated
            parts += [separator] * separated + [ids.astype(self._dtype, copy=False)]
        tokens = np.concatenate(parts)
        largest = int(tokens.max(initial=0))
        return Encoded(tokens.tobytes(), num_tokens, num_bytes, num_read, num_lost, num_replaced, largest)


def _readable(piece: bytes) -> tuple[int, int]:
    """Return the byte sequences of a piece that are not UTF-8, and its size when they are read as U+FFFD."""
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        text = piece.decode("utf-8", errors="replace")
        return text.count("\ufffd") - piece.count("\ufffd".encode()), len(text.encode())
    return 0, len(piece)
