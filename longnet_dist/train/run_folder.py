"""The files of a run, all below ``train.output_dir``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longnet_dist.config.loading import parse_config, read_yaml
from longnet_dist.config.schema import Config
from longnet_dist.data.tokenizers import Tokenizer, tokenizer_from_json
from longnet_dist.errors import CheckpointError, ConfigError
from longnet_dist.train.checkpoint import checkpoints, newest_checkpoint


@dataclass(frozen=True)
class RunFolder:
    """Names and reading of a run's files.

    ::

        config.yaml          the configuration, defaults and mesh filled in
        tokenizer.json       to read text in and write it out
        metrics.jsonl        one object a step
        validation.jsonl     one object a validation
        tensorboard/         the same for TensorBoard
        checkpoints/         see train/checkpoint.py
        loss.png sample.txt  at the end
    """

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def tokenizer_file(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def validation_file(self) -> Path:
        return self.path / "validation.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def curve_file(self) -> Path:
        return self.path / "loss.png"

    @property
    def sample_file(self) -> Path:
        return self.path / "sample.txt"

    def describe(self, config: dict[str, Any], tokenizer: Tokenizer) -> None:
        """Write what evaluation and generation need beside a checkpoint."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.config_file.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        self.tokenizer_file.write_text(json.dumps(tokenizer.to_json(), ensure_ascii=False), encoding="utf-8")

    def config(self) -> Config:
        """The configuration of the run.

        Raises:
            ConfigError: this is no run's folder, or its file is damaged.
        """
        if not self.config_file.is_file():
            raise ConfigError(f"{self.path} is no run's folder: it has no config.yaml; give a train.output_dir")
        return parse_config(read_yaml(self.config_file))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run.

        Raises:
            CheckpointError: its file is missing or damaged.
            DataError: it names a tokenizer that cannot be loaded.
        """
        try:
            return tokenizer_from_json(json.loads(self.tokenizer_file.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"cannot read {self.tokenizer_file}: {error}") from None


def checkpoint_to_resume(folder: RunFolder, resume: str) -> Path | None:
    """The checkpoint that a run goes on from, None for a new one. Nothing is written.

    Args:
        folder: of the run.
        resume: ``train.resume``.

    Raises:
        ConfigError: the folder holds another run that would be overwritten.
        CheckpointError: ``resume`` names no checkpoint.
    """
    existing = checkpoints(folder.path)
    if resume == "auto":
        return existing[-1] if existing else None
    chosen = None if resume == "never" else newest_checkpoint(Path(resume))
    if chosen is not None and existing and chosen.resolve() == existing[-1].resolve():
        return chosen
    if existing or folder.metrics_file.exists():
        raise ConfigError(
            f"train.output_dir={folder.path} already holds a run, which train.resume={resume} would overwrite; "
            f"use another train.output_dir, or train.resume=auto to go on with that run"
        )
    return chosen
