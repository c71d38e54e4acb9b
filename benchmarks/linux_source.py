"""Pack the source of Linux as text for the experiments, in archives small enough to be carried to another machine.

A document is a directory: its files one after the other, each behind a line with its path, so that what a long context
adds is there. Generated register headers, files that are not text and repeated files are left out. Directories come in
random order, so that the first archive alone is a fair sample::

    apt-get download linux-source-6.1 && dpkg-deb -x linux-source-6.1_*.deb .
    tar -xJf usr/src/linux-source-6.1.tar.xz
    python -m benchmarks.linux_source linux-source-6.1 --output linux --archives 2 --mib 56
    longnet prepare linux/*.tar.xz --train-tokenizer 16384 --shuffle 0 --output linux.tokens
"""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

GENERATED = ("asic_reg", "include/generated")
SMALLEST = 2048  # bytes of a document
BEHIND = 6  # MiB that the compressor may still have to write


def main() -> None:
    """Write the archives, and say what they have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the unpacked source")
    parser.add_argument("--output", type=Path, required=True, help="folder for the archives")
    parser.add_argument("--archives", type=int, default=1, help="how many to write at most")
    parser.add_argument("--mib", type=float, default=56, help="MiB of each (default %(default)s)")
    parser.add_argument("--preset", type=int, default=9, help="of xz (default %(default)s)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    documents = documents_of(options.source)
    for number in range(options.archives):
        path = options.output / f"linux-{number}.tar.xz"
        count, size = write_archive(path, documents, int(options.mib * 2**20), options.preset)
        packed = path.stat().st_size
        print(
            f"{path.name}: {count:,} directories, {size / 1e6:.1f} MB of text in {packed / 2**20:.1f} MiB", flush=True
        )


def documents_of(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and text of the directories below ``source``, in an order that never changes."""
    folders = sorted({path.parent for path in source.rglob("*") if path.is_file() and not path.is_symlink()})
    random.Random(0).shuffle(folders)
    seen: set[bytes] = set()
    for folder in folders:
        name = folder.relative_to(source).as_posix()
        if any(part in name for part in GENERATED):
            continue
        parts = []
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.is_symlink() and (text := _text(path)):
                digest = hashlib.sha256(text).digest()
                if digest not in seen:
                    seen.add(digest)
                    parts.append(f"// {name}/{path.name}\n".encode() + text)
        document = b"\n".join(parts)
        if len(document) >= SMALLEST:
            yield name, document


def write_archive(path: Path, documents: Iterator[tuple[str, bytes]], limit: int, preset: int) -> tuple[int, int]:
    """Write documents into one archive of at most about ``limit`` bytes; return how many, and their bytes."""
    count = size = 0
    with (
        path.open("wb") as file,
        lzma.open(file, "wb", preset=preset) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name, text in documents:
            member = tarfile.TarInfo(f"{name.replace('/', '.')}.txt")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
            count, size = count + 1, size + len(text)
            if file.tell() > limit - BEHIND * 2**20:
                break
    return count, size


def _text(path: Path) -> bytes:
    """Return the text of a file; nothing if it is not UTF-8."""
    data = path.read_bytes()
    try:
        data.decode()
    except UnicodeDecodeError:
        return b""
    return b"" if b"\0" in data else data


if __name__ == "__main__":
    main()
