"""All that can be decided, and refused, before the ranks of a run meet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longnet_dist.attention.kernels.registry import check_backend
from longnet_dist.checkpoint.run_folder import ResumePoint, RunFolder, resume_point
from longnet_dist.config.schema import Config
from longnet_dist.data.batches import Batches, Windows, objective
from longnet_dist.data.prepare import default_token_file
from longnet_dist.data.token_file import TokenFile
from longnet_dist.errors import LongNetError
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.model.longnet import positions_of
from longnet_dist.telemetry.loggers import usable_loggers


@dataclass(frozen=True)
class RunSetup(RunLayout):
    """A checked configuration and what follows from it, the same on every rank.

    Attributes:
        folder: of the run.
        resume: the checkpoint to go on from, if any.
    """

    folder: RunFolder
    resume: ResumePoint

    @classmethod
    def make(cls, config: Config, world_size: int, device_type: str) -> RunSetup:
        """Check everything that does not need the other ranks; nothing is written.

        Args:
            config: the run.
            world_size: number of ranks.
            device_type: ``"cuda"`` or ``"cpu"``.

        Raises:
            ConfigError, ShapeError, DataError, CheckpointError: whatever would make the run fail later.
        """
        layout = RunLayout.of(config, world_size, device_type)
        dtype = torch.bfloat16 if layout.precision == "bf16" else torch.float32
        _check_positions(config, dtype)
        check_backend(config.train.attention_backend, torch.device(device_type), dtype, config.train.deterministic)
        usable_loggers(config.train.loggers)
        folder = RunFolder(config.train.output_dir)
        folder.check_writable()
        resume = resume_point(folder, config.train.resume, config.model)
        plan = cls(**vars(layout), folder=folder, resume=resume)
        if config.data.path is not None:
            token_file = TokenFile.open(config.data.path)
            plan.training_data(token_file)
            if config.train.validate_every:
                plan.validation_data(token_file)
        return plan

    def open_token_file(self) -> TokenFile:
        """The token file; that of the default corpus is made by rank 0 if need be. Every rank must call."""
        if self.config.data.path is not None:
            return TokenFile.open(self.config.data.path)
        made: list[Path | LongNetError | None] = [None]
        if dist.get_rank() == 0:
            try:
                made = [default_token_file(self.config.data.cache_dir)]
            except LongNetError as error:
                made = [error]
        dist.broadcast_object_list(made)
        if isinstance(made[0], LongNetError):
            raise made[0]
        assert made[0] is not None
        return TokenFile.open(made[0])

    def training_data(self, token_file: TokenFile) -> Batches:
        """The training split in shuffled batches of the whole world."""
        config = self.config
        length, batch_size, seed = config.data.sequence_length, config.train.batch_size, config.train.seed
        options = objective(config.model) | {"documents": config.data.documents, "packing": config.data.packing}
        return Batches(token_file, "train", length, batch_size, seed, **options)

    def validation_data(self, token_file: TokenFile) -> Windows:
        """The validation split in windows of the training length."""
        config = self.config
        length, documents = config.data.sequence_length, config.data.documents
        return Windows(token_file, "validation", length, **objective(config.model), documents=documents)

    def resolved(self, token_file: TokenFile) -> dict[str, Any]:
        """The configuration as nested values, with what was ``auto`` or left out filled in."""
        values = self.config.model_dump(mode="json")
        values["data"]["path"] = str(token_file.path.resolve())
        values["train"] |= {"precision": self.precision, "micro_batch_size": self.micro_batch_size}
        values["parallel"] |= {"data": self.mesh.data, "sequence": self.mesh.sequence}
        return values


def _check_positions(config: Config, dtype: torch.dtype) -> None:
    """Refuse positions that cannot span a sequence, which the model would notice in its first forward."""
    if positions := positions_of(config.model):
        for pattern in config.model.pattern_counts:
            positions.check(pattern, config.data.sequence_length, config.model.head_dim, dtype)
