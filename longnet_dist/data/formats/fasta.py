"""FASTA: each record is a document, its sequence without the line ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from longnet_dist.data.formats.document import Document, lines_of

JOINED_BYTES = 1 << 16


def fasta_documents(name: str, chunks: Iterable[bytes]) -> Iterator[Document]:
    """Yield a document for each record; the line of its name, which begins with ``>``, is no part of it.

    Args:
        name: of the file.
        chunks: its bytes.
    """
    record, title = 0, b""

    def number(line: bytes) -> int:
        nonlocal record, title
        if line.startswith(b">"):
            record, title = record + 1, line[1:].strip()
        return record

    for _, lines in groupby(lines_of(chunks), number):
        first = title.split(maxsplit=1)[0] if title.split() else b""
        yield Document(f"{name}, record {first.decode(errors='replace')}", _joined(lines))


def _joined(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the sequence of a record in chunks; a line that begins with ``;`` is a comment."""
    parts, size = [], 0
    for line in lines:
        if not line.startswith((b">", b";")):
            parts.append(line.strip())
            size += len(parts[-1])
            if size >= JOINED_BYTES:
                yield b"".join(parts)
                parts, size = [], 0
    if parts:
        yield b"".join(parts)
