"""A token file that changes while it is mapped is noticed, and one that was only touched is not refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from longnet_dist.data.batches import Windows
from longnet_dist.data.token_file import TokenFile
from longnet_dist.data.token_file_writer import TokenFileWriter
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.errors import DataError


def write(path: Path, text: bytes) -> None:
    with TokenFileWriter(path, ByteTokenizer(), overwrite=True) as writer:
        writer.add_document([text])


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    write(tmp_path / "a.tokens", b"text " * 4000)
    return TokenFile.open(tmp_path / "a.tokens")


def later(path: Path) -> None:
    """Move the time of change on, which a coarse clock might not."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def truncate(path: Path) -> None:
    os.truncate(path, 5000)


def flip(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(9000)
        stream.write(b"!")
    later(path)


def flip_edge(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"!")
    later(path)


def overwrite_in_place(path: Path) -> None:
    write(path.with_name("b"), b"else " * 4000)
    path.write_bytes(path.with_name("b").read_bytes())
    later(path)


def no_token_file(path: Path) -> None:
    path.write_bytes(b"x" * 100_000)
    later(path)


def replace(path: Path) -> None:
    write(path, b"else " * 4000)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (truncate, r"truncated from \d+ to 5000 bytes"),
        (flip, "its tokens were overwritten"),
        (flip_edge, "its tokens were overwritten"),
        (overwrite_in_place, "another token file took its place"),
        (no_token_file, "no whole token file"),
        (replace, "another token file took its place"),
    ],
)
def test_a_change_is_noticed(file: TokenFile, change: Callable[[Path], None], what: str) -> None:
    file.check_unchanged()
    change(file.path)
    with pytest.raises(DataError, match=rf"has changed since it was opened: .*{what}.*; give the old file back"):
        file.check_unchanged()


def test_a_truncated_file_is_not_read(file: TokenFile) -> None:
    """A read behind the end of a mapped file would kill the process without a word."""
    windows = Windows(file, "train", 16)
    os.truncate(file.path, 4096 * 2)
    with pytest.raises(DataError, match="truncated from"):
        windows.local([len(windows) - 1])


def test_what_leaves_the_content_as_it_was_is_accepted(file: TokenFile, tmp_path: Path) -> None:
    later(file.path)  # as those do who keep files from being purged
    file.check_unchanged()
    copy = tmp_path / "copy"
    copy.write_bytes(file.path.read_bytes())
    copy.replace(file.path)
    file.check_unchanged()
    file.path.unlink()  # what is mapped stays
    file.check_unchanged()
    assert Windows(file, "train", 5).local([0])[0].tolist() == [list(b"text ")]
