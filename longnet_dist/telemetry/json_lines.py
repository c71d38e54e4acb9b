"""Files with a JSON object on each line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longnet_dist.errors import CheckpointError


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, none if it does not exist. A last line cut short by a crash is left out.

    Raises:
        CheckpointError: another line is damaged.
    """
    if not file.exists():
        return []
    *whole, _ = file.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}; remove it to start its record anew") from None
