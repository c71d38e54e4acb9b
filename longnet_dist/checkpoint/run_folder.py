"""The files of a run, all below ``train.output_dir``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from longnet_dist.checkpoint.format import (
    CheckpointState,
    DamagedCheckpointError,
    checkpoints,
    newest_checkpoint,
    put_aside,
    read_state,
)
from longnet_dist.config.loading import parse_config, read_yaml
from longnet_dist.config.model import LongNetConfig
from longnet_dist.config.schema import Config
from longnet_dist.data.tokenizers import Tokenizer, tokenizer_from_json
from longnet_dist.errors import CheckpointError, ConfigError
from longnet_dist.machine import check_writable


@dataclass(frozen=True)
class RunFolder:
    """Names and reading of a run's files.

    ::

        config.yaml          the configuration, defaults and mesh filled in
        tokenizer.json       to read text in and write it out; of runs on text
        classes.json         names of the classes; of runs that classify features
        metrics.jsonl        one object a step
        validation.jsonl     one object a validation
        tensorboard/         the same for TensorBoard
        checkpoints/         see train/checkpoint.py
        flight_recorder/     the last collectives of every rank, where ranks did not meet
        loss.png sample.txt  at the end
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """Return the path of the resolved configuration, YAML."""
        return self.path / "config.yaml"

    @property
    def tokenizer_file(self) -> Path:
        """Return the path of the tokenizer's description, JSON."""
        return self.path / "tokenizer.json"

    @property
    def classes_file(self) -> Path:
        """Return the path of the names of the classes, a JSON list."""
        return self.path / "classes.json"

    @property
    def metrics_file(self) -> Path:
        """Return the path of the metrics, a JSON line for each step."""
        return self.path / "metrics.jsonl"

    @property
    def validation_file(self) -> Path:
        """Return the path of the validations, a JSON line for each."""
        return self.path / "validation.jsonl"

    @property
    def flight_recorder(self) -> Path:
        """Return the folder of the last collectives of every rank."""
        return self.path / "flight_recorder"

    @property
    def tensorboard(self) -> Path:
        """Return the folder of TensorBoard's events."""
        return self.path / "tensorboard"

    @property
    def curve_file(self) -> Path:
        """Return the path of the loss curve, a picture."""
        return self.path / "loss.png"

    @property
    def sample_file(self) -> Path:
        """Return the path of the text that the trained model wrote."""
        return self.path / "sample.txt"

    def check_writable(self) -> None:
        """Refuse a place where nothing can be written, as far as can be known without writing.

        Raises:
            ConfigError: this folder, or the nearest one above it that exists, is none or cannot be written; or
                something else lies where the run would write a file or a folder of its own.
        """
        check_writable(self.path, f"train.output_dir={self.path}")
        for folder in (self.path / "checkpoints", self.tensorboard, self.flight_recorder):
            if os.path.lexists(folder):
                _check_place(folder, "folder", folder.is_dir())
        replaced = (self.config_file, self.tokenizer_file, self.classes_file)  # which their own mode does not hinder
        for file in (*replaced, self.metrics_file, self.validation_file, self.curve_file, self.sample_file):
            if file.exists():
                _check_place(file, "file", file.is_file(), is_replaced=file in replaced)

    def describe(self, config: dict[str, Any], tokenizer: Tokenizer | None, classes: Sequence[str] = ()) -> None:
        """Write what evaluation and generation need beside a checkpoint: a tokenizer, or names of classes."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        if tokenizer is not None:
            write_text(self.tokenizer_file, json.dumps(tokenizer.to_json(), ensure_ascii=False))
        if classes:
            write_text(self.classes_file, json.dumps(list(classes), ensure_ascii=False))

    def classes(self) -> list[str]:
        """Return the names of the classes of a run that classifies features; empty of others.

        Raises:
            CheckpointError: their file is damaged.
        """
        if not self.classes_file.exists():
            return []
        try:
            return list(map(str, json.loads(self.classes_file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"cannot read {self.classes_file}: {error}") from None

    def was_begun_with(self, resume: str) -> bool:
        """Say whether the last start of this run had the same path as ``train.resume``."""
        if resume in ("auto", "never") or not self.config_file.is_file():
            return False
        train = read_yaml(self.config_file).get("train")
        last = train.get("resume") if isinstance(train, dict) else None
        return isinstance(last, str) and _place(last) == _place(resume)

    def config(self) -> Config:
        """Return the configuration of the run.

        Raises:
            ConfigError: this is no run's folder, or its file is damaged.
        """
        if not self.config_file.is_file():
            raise ConfigError(f"{self.path} is no run's folder: it has no config.yaml; give a train.output_dir")
        return parse_config(read_yaml(self.config_file))

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the run.

        Raises:
            CheckpointError: its file is missing or damaged.
            DataError: it names a tokenizer that cannot be loaded.
        """
        try:
            return tokenizer_from_json(json.loads(self.tokenizer_file.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"cannot read {self.tokenizer_file}: {error}") from None


def _check_place(path: Path, kind: str, is_kind: bool, is_replaced: bool = False) -> None:
    """Refuse what is of another kind than the run would write there, or cannot be written."""
    fault = f"is no {kind}" if not is_kind else ""
    if is_kind and not is_replaced and not os.access(path, os.W_OK):
        fault = "cannot be written"
    if fault:
        raise ConfigError(
            f"the run writes the {kind} {path}, but what is there {fault}; move it away, or use another "
            "train.output_dir"
        )


def _place(path: str) -> Path:
    return Path(path).expanduser().resolve()


@dataclass(frozen=True)
class ResumePoint:
    """Hold the checkpoint that a run goes on from.

    Attributes:
        checkpoint: its folder, None for a new run.
        state: of that checkpoint.
        damaged: newer checkpoints that cannot be used, and why.
    """

    checkpoint: Path | None = None
    state: CheckpointState | None = None
    damaged: dict[Path, str] = field(default_factory=dict)


def resume_point(folder: RunFolder, resume: str, model: LongNetConfig) -> ResumePoint:
    """Find the checkpoint from which a run goes on, if it is not new. Nothing is written.

    With ``auto`` a damaged checkpoint is passed over for the one before. So it is with the path of another run if this
    folder's run was begun with the same path: the command that was interrupted goes on.

    Args:
        folder: of the run.
        resume: ``train.resume``.
        model: of the run.

    Raises:
        ConfigError: the folder holds another run that would be overwritten.
        CheckpointError: ``resume`` names no checkpoint, a damaged one, or one of another model; or all are damaged.
    """
    existing = checkpoints(folder.path)
    if resume == "auto" or (existing and folder.was_begun_with(resume)):
        return _newest_intact(existing, model)
    chosen = None if resume == "never" else newest_checkpoint(Path(resume).expanduser())
    is_ours = chosen is not None and existing and chosen.resolve() == existing[-1].resolve()
    if not is_ours and (existing or (folder.metrics_file.exists() and not folder.was_begun_with(resume))):
        raise ConfigError(
            f"train.output_dir={folder.path} already holds a run, which train.resume={resume} would overwrite; "
            f"use another train.output_dir, or train.resume=auto to go on with that run"
        )
    return ResumePoint(chosen, read_state(chosen, model)) if chosen else ResumePoint()


def _newest_intact(existing: Sequence[Path], model: LongNetConfig) -> ResumePoint:
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(existing):
        try:
            return ResumePoint(checkpoint, read_state(checkpoint, model), damaged)
        except DamagedCheckpointError as error:
            damaged[checkpoint] = str(error)
    if damaged:
        raise CheckpointError(
            f"all checkpoints of the run are damaged, the newest so: {next(iter(damaged.values()))}; use another "
            f"train.output_dir to begin anew"
        )
    return ResumePoint()


def set_aside(damaged: Mapping[Path, str]) -> None:
    """Rename damaged checkpoints, so that they neither count as a run's nor are in the way of new ones, and say so."""
    for folder, reason in damaged.items():
        print(f"passed over a checkpoint: {reason}; it is now {put_aside(folder, 'damaged')}", file=sys.stderr)


def write_text(file: Path, text: str) -> None:
    """Write a file that others see in its old or its new state only, whenever this process ends."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
