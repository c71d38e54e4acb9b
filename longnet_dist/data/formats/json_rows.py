"""JSON lines: each line is an object, and one of its keys is the text of a document."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator

from longnet_dist.data.formats.document import Document, lines_of
from longnet_dist.errors import DataError


def json_documents(
    name: str, chunks: Iterable[bytes], column: str, note_empty: Callable[[str], None]
) -> Iterator[Document]:
    """Yield a document for each line.

    Args:
        name: of the file.
        chunks: its bytes.
        column: key of the text.
        note_empty: is told the places of lines whose text is null or empty.

    Raises:
        DataError: a line that is no JSON object, or has no text under the key.
    """
    for number, line in enumerate(lines_of(chunks), 1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place} is no JSON ({error}); mend it, or read it as text: --format text") from None
        if not isinstance(row, dict) or column not in row:
            keys = f"the keys {', '.join(map(repr, row))}" if isinstance(row, dict) else "no keys"
            raise DataError(f"{place} has {keys}, and no {column!r}; name the key of the text: --text-column KEY")
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"{place}: {column!r} must be text, not {type(text).__name__}; name the key of the text: "
                "--text-column KEY"
            )
        if text:
            # Half of a surrogate pair is no character: it becomes U+FFFD, and is counted.
            yield Document(place, [text.encode("utf-8", errors="surrogatepass")])
        else:
            note_empty(place)
