"""Files with a JSON object on each line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines, each with its ``step``; none if the file does not exist.

    Damaged lines, such as the zeros that a crash of a machine leaves, are left out with a message. So is a last line
    without its end, but without a message.
    """
    if not file.exists():
        return []
    *whole, _ = file.read_bytes().split(b"\n")
    records = [_record(line) for line in whole]
    if damaged := [number for number, record in enumerate(records, 1) if record is None]:
        print(f"warning: {file} has {len(damaged)} damaged lines, the first in line {damaged[0]}", file=sys.stderr)
    return [record for record in records if record is not None]


def json_text(value: Any) -> str:
    """Return JSON in one line, in which numbers that are not finite are null, since JSON has none of these."""
    return json.dumps(_finite(value), allow_nan=False)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value
