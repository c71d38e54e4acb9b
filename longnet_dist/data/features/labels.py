"""The class of each sequence, from a CSV file or JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longnet_dist.errors import DataError

JSON_LINES = (".jsonl", ".ndjson")
KEYS = ("name", "label")


@dataclass(frozen=True)
class Labels:
    """Labels are the classes of files of features.

    Attributes:
        classes: their names, in alphabetical order, or in that of the trained model.
        numbers: number of the class of each file that has a label, by its name, in the order of the files.
        left_out: names of the files without a label.
        notes: for people, what else was left out, a line each.
    """

    classes: tuple[str, ...]
    numbers: dict[str, int]
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_labels(path: Path, files: Mapping[str, Path], classes: Sequence[str] = ()) -> Labels:
    """Read the classes of files. The classes are those that a file has, so a name of no file adds none.

    A first line that names no file, with a label of its own, is a header.

    Args:
        path: CSV lines ``name,label``, or JSON lines with the keys ``name`` and ``label`` (``.jsonl``, ``.ndjson``). A
            name is that of a file, with or without its suffix.
        files: of features, by their names without suffix.
        classes: that a trained model knows, of which the labels must be; empty: they follow from the labels.

    Raises:
        DataError: the file cannot be read, a line has something else, a name has two labels, no line names a file, or
            the labels have fewer than two classes, or others than those of the model.
    """
    by_file = {file.name: name for name, file in files.items()}
    lines = [(number, by_file.get(name, name), label) for number, name, label in _lines(path)]
    if not lines:
        raise DataError(f"{path} has no labels; give CSV lines name,label")
    found: dict[str, str] = {}
    for _, name, label in lines:
        if found.setdefault(name, label) != label:
            raise DataError(f"{path} gives {name} two labels, {found[name]} and {label}; keep one of them")
    labels = {name: found[name] for name in files if name in found}
    if not labels:
        raise DataError(
            f"none of the {len(found)} names in {path} is one of the {len(files)} files, which begin with "
            f"{next(iter(files))}, while the names begin with {', '.join(list(found)[:2])}; name the files, with or "
            "without their suffix"
        )
    known = tuple(classes) or tuple(sorted(set(labels.values())))
    if unknown := sorted(set(labels.values()) - set(known)):
        raise DataError(f"{path} has the label {unknown[0]}, but the model knows {', '.join(known)}")
    if len(known) < 2:
        raise DataError(f"{path} gives the files one class, {known[0]}, but classification needs at least two")
    numbers = {name: known.index(label) for name, label in labels.items()}
    return Labels(known, numbers, tuple(name for name in files if name not in found), _notes(path, lines, files))


def _notes(path: Path, lines: list[tuple[int, str, str]], files: Mapping[str, Path]) -> tuple[str, ...]:
    """Say which lines name no file: the header, and those of files that are not there."""
    strange = [(number, name, label) for number, name, label in lines if name not in files]
    notes = []
    if strange and path.suffix not in JSON_LINES:
        number, name, label = strange[0]
        if number == lines[0][0] and [other for *_, other in lines].count(label) == 1:
            notes.append(f"line {number} of {path} is taken as its header: {name},{label}")
            strange = strange[1:]
    if strange:
        notes.append(
            f"left out: {len(strange)} of {len(lines)} lines of {path}, which name no file, first {strange[0][1]}"
        )
    return tuple(notes)


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield number, name and label of each line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _json_lines(file) if path.suffix in JSON_LINES else csv.reader(file)
            for number, row in enumerate(rows, 1):
                if not row:
                    continue
                cells = [cell.strip() for cell in row]
                if len(cells) != 2 or not all(cells):
                    raise DataError(
                        f"line {number} of {path} must have a name and a label, but is {row}; keep these two columns, "
                        "with a comma between them"
                    )
                name, label = cells
                yield number, name, label
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read the labels in {path}: {error}") from None


def _json_lines(file: Iterator[str]) -> Iterator[list[str]]:
    for line in file:
        if line.strip():
            values = json.loads(line)
            fields = values if isinstance(values, dict) else {}
            yield [str(fields[key]) for key in KEYS if fields.get(key) is not None]
