"""A corpus is tokenized and written into a token file."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from longnet_dist.data.corpus import Corpus, standard_library
from longnet_dist.data.token_file import Header, TokenFile
from longnet_dist.data.token_file_writer import TokenFileWriter
from longnet_dist.data.tokenizers import ByteTokenizer, Tokenizer
from longnet_dist.errors import DataError


@dataclass(frozen=True)
class Prepared:
    """A Prepared reports what ``prepare`` wrote and what it left out.

    Attributes:
        path: the token file.
        header: its header.
        num_hidden: hidden files and folders that were skipped.
        num_binary: binary files that were skipped.
        num_replaced: byte sequences that are not UTF-8 and were read as U+FFFD.
        num_lost, num_read: bytes of text that the tokenizer dropped, of all that were read.
        left_out: what else was left out, by kind: how many, and the name of the first.
        seconds: time that it took.
    """

    path: Path
    header: Header
    num_hidden: int
    num_binary: int
    num_replaced: int
    num_lost: int
    num_read: int
    left_out: dict[str, tuple[int, str]]
    seconds: float

    def summary(self) -> str:
        """Return the result in one line, and in a second one what was left out or replaced, if anything."""
        header = self.header
        train, validation = (split.last - split.first for split in (header.train, header.validation))
        rate = header.num_bytes / 1e6 / max(self.seconds, 1e-9)
        lines = [
            f"{self.path}: {header.num_documents:,} documents, {header.num_bytes:,} bytes -> {header.num_tokens:,} "
            f"tokens ({train:,} train, {validation:,} validation), {header.dtype}, {rate:.1f} MB/s"
        ]
        losses = {
            "binary files skipped": self.num_binary,
            "hidden files and folders skipped": self.num_hidden,
            "byte sequences that are not UTF-8 read as U+FFFD": self.num_replaced,
        }
        said = [f"{count:,} {what}" for what, count in losses.items() if count]
        said += _said(self.left_out)
        if self.num_lost:
            share = self.num_lost / self.num_read
            said.append(f"{self.num_lost:,} of {self.num_read:,} bytes ({share:.1%}) dropped by the tokenizer")
        if said:
            lines.append(", ".join(said))
        return "\n".join(lines)


def prepare(
    corpus: Corpus,
    output: str | Path,
    tokenizer: Tokenizer,
    *,
    validation: float = 0.05,
    overwrite: bool = False,
    source: str = "",
    num_workers: int = 1,
    shuffle: int | None = None,
) -> Prepared:
    """Write the token file ``output`` from a corpus, with a progress bar over the bytes on disk.

    Args:
        corpus: the documents, as from :func:`~longnet_dist.data.corpus.find_corpus`.
        output, tokenizer, validation, overwrite, source, num_workers, shuffle: as for
            :class:`~longnet_dist.data.token_file_writer.TokenFileWriter`.

    Raises:
        DataError: an input cannot be read, the output exists or cannot be written, or the corpus has no text.
        MissingExtraError: a Parquet or Zstandard file, whose package is not installed.
    """
    begin = time.perf_counter()
    if Path(output).resolve() in {path.resolve() for path in corpus.paths}:
        raise DataError(f"the output {output} is one of the inputs; write to another file")
    with (
        TokenFileWriter(
            output,
            tokenizer,
            validation=validation,
            overwrite=overwrite,
            source=source,
            num_workers=num_workers,
            shuffle=shuffle,
        ) as writer,
        tqdm(
            total=corpus.total_bytes or None, unit="B", unit_scale=True, desc=f"prepare {writer.path.name}"
        ) as progress,
    ):
        for document in corpus:
            writer.add_document(_counted(document.chunks, corpus, progress))
        progress.update(corpus.bytes_read - progress.n)
        writer.flush()
        if writer.num_tokens == 0:
            skipped = [f"{corpus.num_binary} binary and {corpus.num_hidden} hidden ones were skipped"]
            raise DataError(
                f"the input holds no text ({len(corpus.paths)} files; {', '.join(skipped + _said(corpus.left_out))}); "
                "give files of text"
            )
    assert writer.header is not None  # leaving the block wrote it
    return Prepared(
        path=writer.path,
        header=writer.header,
        num_hidden=corpus.num_hidden,
        num_binary=corpus.num_binary,
        num_replaced=writer.num_replaced,
        num_lost=writer.num_lost,
        num_read=writer.num_read,
        left_out=corpus.left_out,
        seconds=time.perf_counter() - begin,
    )


def default_token_file(directory: str | Path) -> Path:
    """Return the token file of the default corpus, the source of Python's standard library as bytes.

    The file is made once. If ``directory`` has one of the same Python, it is verified and returned.

    Only one process should call this, rank 0, with a barrier after it. If several do, the work is done several times,
    but the file is complete in any case.

    Args:
        directory: folder of the file.

    Raises:
        DataError: the existing file is damaged, or the file cannot be written.
    """
    source = f"standard library of {platform.python_implementation()} {platform.python_version()}"
    path = Path(directory) / f"{source.lower().replace(' ', '_')}.tokens"
    if path.exists():
        header = TokenFile.open(path, verify=True).header
        same = (header.source, header.tokenizer) == (source, ByteTokenizer().to_json())
        if same and header.edges:  # older versions wrote none
            return path
    return prepare(standard_library(), path, ByteTokenizer(), overwrite=True, source=source).path


def _said(left_out: Mapping[str, tuple[int, str]]) -> list[str]:
    """Say what was left out, each kind with its first."""
    return [f"{count:,} {what} (the first is {name})" for what, (count, name) in left_out.items()]


def _counted(chunks: Iterable[bytes], corpus: Corpus, progress: tqdm[NoReturn]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        progress.update(corpus.bytes_read - progress.n)
