"""trackio: a dashboard on this machine. ``trackio show`` opens it; ``TRACKIO_DIR`` says where records lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longnet_dist.checkpoint.run_folder import RunFolder
from longnet_dist.telemetry.loggers import LOGGERS, Kind, Logger


@LOGGERS.register("trackio")
class TrackioLogger(Logger):
    """Log ``train/…`` and ``validation/…`` to the project that ``TRACKIO_PROJECT`` names, by default longnet_dist."""

    package = module = "trackio"

    def __init__(self, folder: RunFolder, last_step: int, config: Mapping[str, Any]) -> None:
        super().__init__(folder, last_step, config)
        import os

        import trackio

        project = os.environ.get("TRACKIO_PROJECT", "longnet_dist")
        quiet: dict[str, Any] = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
        name = folder.path.name
        self._run = trackio.init(project=project, name=name, config=dict(config), resume="allow", **quiet)

    def log(self, kind: Kind, step: int, fields: Mapping[str, float | None]) -> None:
        """Record the fields as ``kind/field`` at the step."""
        known = {f"{kind}/{name}": value for name, value in fields.items() if value is not None}
        self._run.log(known, step=step)

    def close(self) -> None:
        """End trackio's run."""
        self._run.finish()  # type: ignore[no-untyped-call]
