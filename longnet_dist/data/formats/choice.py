"""The format of a file follows from its name."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

from longnet_dist.data.formats.compression import without_compression

Format = Literal["text", "jsonl", "parquet", "fasta"]

SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".fasta": "fasta",
    ".fa": "fasta",
    ".fna": "fasta",
    ".ffn": "fasta",
    ".faa": "fasta",
    ".frn": "fasta",
}


def format_of(name: str) -> Format:
    """Return the format of a file, from its name without the suffix of a compression."""
    return SUFFIXES.get(PurePath(without_compression(name)).suffix.lower(), "text")
