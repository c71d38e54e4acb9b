"""Real text of any size for a benchmark, from the files of the machine that runs it."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from longnet_dist.data.corpus import HEAD_BYTES
from longnet_dist.data.token_file_writer import TokenFileWriter
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.errors import DataError

DEFAULT_FOLDERS = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sys.base_prefix, "/usr", "/opt")


def write_text(path: Path, num_tokens: int, folders: Sequence[str | Path] = DEFAULT_FOLDERS) -> int:
    """Write a token file of ``num_tokens`` bytes or one more: text files below some folders, repeated if too few.

    Files with a zero byte in their first 8 KiB are taken for binary, as ``longnet prepare`` does.

    Returns:
        How many of the bytes are no repetition.
    """
    distinct = 0
    source = ", ".join(map(str, folders))
    with (
        TokenFileWriter(path, ByteTokenizer(), validation=0.0, source=source) as writer,
        tqdm(total=num_tokens, unit="B", unit_scale=True, desc="text") as bar,
    ):
        while writer.num_tokens < num_tokens:
            for content in _texts(folders):
                writer.add_document([content[: num_tokens - writer.num_tokens]])
                writer.flush()  # so that the count is that of all so far
                bar.update(writer.num_tokens - bar.n)
                if writer.num_tokens >= num_tokens:
                    break
            else:
                distinct = distinct or writer.num_tokens
            if not writer.num_tokens:
                raise DataError(f"there is no text below {source}; name other folders with --text")
    return distinct or writer.num_tokens


def _texts(folders: Sequence[str | Path]) -> Iterator[bytes]:
    """The content of every text file, in a fixed order, each file once."""
    seen = set()
    for folder in folders:
        for root, subfolders, names in os.walk(folder):
            subfolders.sort()
            for path in (os.path.join(root, name) for name in sorted(names)):
                if os.path.islink(path) or not os.path.isfile(path) or os.path.realpath(path) in seen:
                    continue
                seen.add(os.path.realpath(path))
                try:
                    with open(path, "rb") as file:
                        head = file.read(HEAD_BYTES)
                        if b"\0" not in head:
                            yield head + file.read()
                except OSError:
                    continue
