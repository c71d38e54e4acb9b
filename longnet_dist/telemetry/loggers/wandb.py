"""Weights & Biases. ``WANDB_MODE=offline`` records without a network, and ``wandb sync`` uploads later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longnet_dist.checkpoint.run_folder import RunFolder
from longnet_dist.telemetry.loggers import LOGGERS, Kind, Logger


@LOGGERS.register("wandb")
class WandbLogger(Logger):
    """Log ``train/…`` and ``validation/…`` to the project that ``WANDB_PROJECT`` names, by default longnet_dist.

    A resumed run goes on under the name of its folder. Its metrics have their own step, because Weights & Biases
    refuses a step that is not greater than the last one.
    """

    package = module = "wandb"

    def __init__(self, folder: RunFolder, last_step: int, config: Mapping[str, Any]) -> None:
        super().__init__(folder, last_step, config)
        import os

        import wandb

        project = os.environ.get("WANDB_PROJECT", "longnet_dist")
        self._run = wandb.init(
            project=project, name=folder.path.name, dir=str(folder.path), config=dict(config), resume="allow"
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, kind: Kind, step: int, fields: Mapping[str, float | None]) -> None:
        """Record the fields as ``kind/field`` at the step."""
        known = {f"{kind}/{name}": value for name, value in fields.items() if value is not None}
        self._run.log({**known, "step": step})

    def close(self) -> None:
        """End the run of Weights & Biases."""
        self._run.finish()
