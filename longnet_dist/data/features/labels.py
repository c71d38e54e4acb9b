"""The class of each sequence, from a CSV file or JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from longnet_dist.errors import DataError

JSON_LINES = (".jsonl", ".ndjson")
HEADER = ("name", "label")


def read_labels(path: Path) -> dict[str, str]:
    """Return the label of each name.

    Args:
        path: CSV lines ``name,label``, whose first may say just that; or JSON lines with the keys ``name`` and
            ``label`` (``.jsonl``, ``.ndjson``). A name is that of a file of features, without its suffix.

    Raises:
        DataError: the file cannot be read, a line has something else, or a name has two labels.
    """
    found: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = _json_lines(file) if path.suffix in JSON_LINES else csv.reader(file)
            for number, line in enumerate(lines, 1):
                if not line or (number == 1 and tuple(cell.strip().lower() for cell in line) == HEADER):
                    continue
                if len(line) != 2 or not all(cell.strip() for cell in line):
                    raise DataError(f"line {number} of {path} must have a name and a label, but is {line}")
                name, label = (cell.strip() for cell in line)
                if found.setdefault(name, label) != label:
                    raise DataError(f"{path} gives {name} two labels, {found[name]} and {label}; keep one of them")
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read the labels in {path}: {error}") from None
    if not found:
        raise DataError(f"{path} has no labels; give CSV lines name,label")
    return found


def _json_lines(file: Iterator[str]) -> Iterator[list[str]]:
    for line in file:
        if line.strip():
            values = json.loads(line)
            fields = values if isinstance(values, dict) else {}
            yield [str(fields[key]) for key in HEADER if fields.get(key) is not None]
