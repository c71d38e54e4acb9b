"""TensorBoard events in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longnet_dist.checkpoint.run_folder import RunFolder
from longnet_dist.telemetry.loggers import LOGGERS, Kind, Logger


@LOGGERS.register("tensorboard")
class TensorBoardLogger(Logger):
    """Write scalars ``train/…`` and ``validation/…`` to ``tensorboard/``."""

    package = module = "tensorboard"
    optional = True

    def __init__(self, folder: RunFolder, last_step: int, config: Mapping[str, Any]) -> None:
        super().__init__(folder, last_step, config)
        # TensorBoard takes a second to import, which evaluation and generation need not wait for.
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder.tensorboard), purge_step=last_step + 1)

    def log(self, kind: Kind, step: int, fields: Mapping[str, float | None]) -> None:
        """Write each field as a scalar ``kind/field`` at the step."""
        for name, value in fields.items():
            if value is not None:
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self._board.close()
