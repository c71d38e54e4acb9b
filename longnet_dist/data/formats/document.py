"""A document is one text of a corpus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """A Document is one text, in chunks of bytes.

    The chunks are read from the open file of the corpus, so they must be consumed before the next document is taken.

    Attributes:
        name: path of the file, or of the archive and the member, and the place in it.
        chunks: the text, as bytes.
    """

    name: str
    chunks: Iterable[bytes]


def lines_of(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a text, without their ends, from chunks of any size."""
    rest: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = others[-1:]
    if any(rest):
        yield b"".join(rest)
