"""``metrics.jsonl`` and ``validation.jsonl``: one JSON object a line, which the loss curve is drawn from."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longnet_dist.checkpoint.run_folder import RunFolder, write_text
from longnet_dist.telemetry.json_lines import json_text, read_jsonl
from longnet_dist.telemetry.loggers import LOGGERS, Kind, Logger


@LOGGERS.register("jsonl")
class JsonlLogger(Logger):
    """Append a line for every step to ``metrics.jsonl``, and for every validation to ``validation.jsonl``.

    Lines that a full or absent disk does not take are a warning. They are kept in memory and written with later ones.
    """

    def __init__(self, folder: RunFolder, last_step: int, config: Mapping[str, Any]) -> None:
        super().__init__(folder, last_step, config)
        files = {"train": folder.metrics_file, "validation": folder.validation_file}
        for file in files.values():
            kept = [line for line in read_jsonl(file) if line["step"] <= last_step]
            write_text(file, "".join(json_text(line) + "\n" for line in kept))
        self._files = {kind: _Lines(file) for kind, file in files.items()}

    def log(self, kind: Kind, step: int, fields: Mapping[str, float | None]) -> None:
        """Append a line to the file of the kind."""
        self._files[kind].write(json_text({"step": step, **fields}) + "\n")

    def close(self) -> None:
        """Close both files."""
        for file in self._files.values():
            file.close()


class _Lines:
    """Append lines to a file; what cannot be written waits for the next line."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("ab", buffering=0)
        self._waiting, self._warned = b"", False

    def write(self, line: str) -> None:
        self._waiting += line.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._warned = False
        except OSError as error:
            if not self._warned:
                tqdm.write(f"warning: cannot write {self._path}: {error}; its lines wait in memory", file=sys.stderr)
            self._warned = True

    def close(self) -> None:
        self.write("")
        self._file.close()
