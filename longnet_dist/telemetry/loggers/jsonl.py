"""``metrics.jsonl`` and ``validation.jsonl``: one JSON object a line, which the loss curve is drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longnet_dist.checkpoint.run_folder import RunFolder, write_text
from longnet_dist.telemetry.json_lines import json_text, read_jsonl
from longnet_dist.telemetry.loggers import LOGGERS, Kind, Logger


@LOGGERS.register("jsonl")
class JsonlLogger(Logger):
    """Append a line for every step to ``metrics.jsonl``, and for every validation to ``validation.jsonl``."""

    def __init__(self, folder: RunFolder, last_step: int, config: Mapping[str, Any]) -> None:
        super().__init__(folder, last_step, config)
        files = {"train": folder.metrics_file, "validation": folder.validation_file}
        for file in files.values():
            kept = [line for line in read_jsonl(file) if line["step"] <= last_step]
            write_text(file, "".join(json_text(line) + "\n" for line in kept))
        self._files = {kind: file.open("a", encoding="utf-8", buffering=1) for kind, file in files.items()}

    def log(self, kind: Kind, step: int, fields: Mapping[str, float | None]) -> None:
        """Append a line to the file of the kind."""
        self._files[kind].write(json_text({"step": step, **fields}) + "\n")

    def close(self) -> None:
        """Close both files."""
        for file in self._files.values():
            file.close()
