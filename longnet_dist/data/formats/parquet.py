"""Parquet: each row is a document, and one column is its text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import IO

from longnet_dist.data.formats.document import Document
from longnet_dist.errors import DataError
from longnet_dist.extras import require_extra

BATCH_ROWS = 256


def parquet_documents(
    name: str, stream: IO[bytes], column: str, note_empty: Callable[[str], None]
) -> Iterator[Document]:
    """Yield a document for each row.

    Args:
        name: of the file.
        stream: the file, which must seek: a Parquet file is read from its end.
        column: column of the text.
        note_empty: is told the places of rows whose text is null or empty.

    Raises:
        DataError: the file cannot seek, is no Parquet file, or has no such column of text.
        MissingExtraError: pyarrow is not installed.
    """
    require_extra("data", "a Parquet file", only="pyarrow")
    import pyarrow
    import pyarrow.parquet

    if not _seeks(stream):
        raise DataError(
            f"{name} is in a tar archive, a pipe or compressed by Zstandard, where Parquet cannot be read "
            "from its end; unpack it first"
        )
    try:
        with pyarrow.parquet.ParquetFile(pyarrow.PythonFile(stream, mode="r")) as file:
            _check_column(name, file.schema_arrow, column)
            row = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text:
                        data = text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogatepass")
                        yield Document(f"{name}, row {row}", [data])
                    else:
                        note_empty(f"{name}, row {row}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{name} cannot be read as Parquet ({error}); mend it or leave it out") from error


def _seeks(stream: IO[bytes]) -> bool:
    try:
        return stream.seekable()
    except AttributeError:  # a member of a tar archive that is read as a stream
        return False


def _check_column(name: str, schema: object, column: str) -> None:
    import pyarrow

    assert isinstance(schema, pyarrow.Schema)
    names = ", ".join(schema.names)
    if column not in schema.names:
        raise DataError(f"{name} has the columns {names}, and no {column!r}; name that of the text: --text-column NAME")
    if (count := schema.names.count(column)) > 1:
        raise DataError(f"{name} has {count} columns {column!r}; rename all but one of them")
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    # A column in which every row is null can have the type null.
    if str(kind) not in ("string", "large_string", "string_view", "binary", "large_binary", "null"):
        raise DataError(f"{name}: the column {column!r} must be text, not {kind}; name another: --text-column NAME")
