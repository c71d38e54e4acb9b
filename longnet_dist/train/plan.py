"""All that can be decided, and refused, before the ranks of a run meet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longnet_dist.comm.mesh import MeshShape
from longnet_dist.config.model import LongNetConfig
from longnet_dist.config.schema import Config, Precision
from longnet_dist.data.batches import Batches, Objective, Windows
from longnet_dist.data.prepare import default_token_file
from longnet_dist.data.token_file import TokenFile
from longnet_dist.errors import ConfigError, LongNetError
from longnet_dist.geometry.stream import chunks_of
from longnet_dist.model.longnet import positions_of
from longnet_dist.train.run_folder import ResumePoint, RunFolder, resume_point


@dataclass(frozen=True)
class RunPlan:
    """A checked configuration and what follows from it, the same on every rank.

    Attributes:
        config: as given.
        precision: for the devices of the run.
        mesh: ranks along each axis.
        micro_batch_size: sequences that a data rank holds at once.
        accumulation: micro-batches of a step.
        chunk_length: rows of a sequence that its ranks hold together at once.
        passes: chunks of all micro-batches of a step.
        folder: of the run.
        resume: the checkpoint to go on from, if any.
    """

    config: Config
    precision: Precision
    mesh: MeshShape
    micro_batch_size: int
    accumulation: int
    chunk_length: int
    passes: int
    folder: RunFolder
    resume: ResumePoint

    @classmethod
    def make(cls, config: Config, world_size: int, device_type: str) -> RunPlan:
        """Check everything that does not need the other ranks; nothing is written.

        Args:
            config: the run.
            world_size: number of ranks.
            device_type: ``"cuda"`` or ``"cpu"``.

        Raises:
            ConfigError, ShapeError, DataError, CheckpointError: whatever would make the run fail later.
        """
        mesh = MeshShape.of(config.parallel, world_size)
        micro_batch_size, accumulation = _split_batch(config, mesh)
        chunk_length = _chunk_length(config, mesh)
        precision = config.precision(device_type)
        _check_positions(config, precision)
        folder = RunFolder(config.train.output_dir)
        folder.check_writable()
        plan = cls(
            config=config,
            precision=precision,
            mesh=mesh,
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            chunk_length=chunk_length,
            passes=accumulation * len(chunks_of(config.data.sequence_length, chunk_length, mesh.sequence)),
            folder=folder,
            resume=resume_point(folder, config.train.resume, config.model),
        )
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
        return Batches(token_file, "train", length, batch_size, seed, **objective(config.model))

    def validation_data(self, token_file: TokenFile) -> Windows:
        """The validation split in windows of the training length."""
        config = self.config
        return Windows(token_file, "validation", config.data.sequence_length, **objective(config.model))

    def resolved(self, token_file: TokenFile) -> dict[str, Any]:
        """The configuration as nested values, with what was ``auto`` or left out filled in."""
        values = self.config.model_dump(mode="json")
        values["data"]["path"] = str(token_file.path.resolve())
        values["train"] |= {"precision": self.precision, "micro_batch_size": self.micro_batch_size}
        values["parallel"] |= {"data": self.mesh.data, "sequence": self.mesh.sequence}
        return values


def objective(model: LongNetConfig) -> dict[str, Any]:
    """The arguments of ``Windows`` and ``Batches`` that follow from the model: what it predicts, and its ids."""
    kind: Objective = "causal" if model.causal else "masked"
    return {"objective": kind, "mask_id": model.mask_id, "vocab_size": model.vocab_size}


def _check_positions(config: Config, precision: Precision) -> None:
    """Refuse positions that cannot span a sequence, which the model would notice in its first forward."""
    if positions := positions_of(config.model):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        positions.check(config.model.pattern, config.data.sequence_length, config.model.head_dim, dtype)


def _split_batch(config: Config, mesh: MeshShape) -> tuple[int, int]:
    """Sequences of a micro-batch, and micro-batches of a step."""
    batch_size = config.train.batch_size
    micro_batch_size = config.train.micro_batch_size or max(1, batch_size // mesh.data)
    if batch_size % (micro_batch_size * mesh.data):
        raise ConfigError(
            f"train.batch_size must be a multiple of train.micro_batch_size × data ranks, but it is {batch_size} for "
            f"micro-batches of {micro_batch_size} on {mesh.data} data ranks; use train.batch_size="
            f"{-(-batch_size // (micro_batch_size * mesh.data)) * micro_batch_size * mesh.data} or another mesh"
        )
    return micro_batch_size, batch_size // (micro_batch_size * mesh.data)


def _chunk_length(config: Config, mesh: MeshShape) -> int:
    """Rows of a chunk, all sequence ranks together."""
    length = config.train.chunk_length
    if length is None or length >= config.data.sequence_length:
        return config.data.sequence_length
    if length % mesh.sequence:
        raise ConfigError(
            f"train.chunk_length must be a multiple of the sequence ranks, which share a chunk, but {length} is none "
            f"of {mesh.sequence}; use {-(-length // mesh.sequence) * mesh.sequence}"
        )
    return length
