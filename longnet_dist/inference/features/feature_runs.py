"""What is done with a run on features, or its export: measuring it, and taking its encoder or its classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from longnet_dist.checkpoint.format import (
    STATE_FILE,
    CheckpointState,
    load_weights,
    newest_checkpoint,
    read_state,
    sha256_of,
)
from longnet_dist.checkpoint.identity import code_versions, digest_of
from longnet_dist.checkpoint.run_folder import RunFolder
from longnet_dist.comm.agreement import agreed
from longnet_dist.comm.launch_env import LaunchEnvironment, meeting_store
from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.config.hf_model import read_model_config
from longnet_dist.config.loading import parse_config
from longnet_dist.config.schema import Config, Precision
from longnet_dist.data.features.feature_batches import FeatureBatches
from longnet_dist.data.features.feature_set import FeatureSet, Split, encoder_of
from longnet_dist.errors import CheckpointError, ConfigError
from longnet_dist.inference.features.exported_task import HEAD_FILE, load_head, read_classes, save_task
from longnet_dist.inference.features.feature_evaluation import evaluate_features
from longnet_dist.inference.runs import MEETING_TIME, meshed
from longnet_dist.model.encoder import LongNetEncoder
from longnet_dist.model.feature_tasks import FEATURE_TASKS, FeatureTask
from longnet_dist.model.pretrained import CONFIG_FILE, WEIGHTS_FILE, from_pretrained
from longnet_dist.numerics import dtype_of


def is_feature_run(path: Path) -> bool:
    """Say whether a path is a run on features, or one of its checkpoints.

    Raises:
        ConfigError: the configuration of the run is damaged.
    """
    run = RunFolder(path.resolve().parent.parent if (path / STATE_FILE).is_file() else path)
    return run.config_file.is_file() and run.config().data.features is not None


def is_exported_encoder(path: Path) -> bool:
    """Say whether a path is an encoder of features in a folder of its own, with or without a head.

    Raises:
        ConfigError: the configuration is damaged.
    """
    if not (path / CONFIG_FILE).is_file() or (path / STATE_FILE).is_file():
        return False
    fields = read_model_config(path)
    return fields.get("kind") == "encoder" and fields.get("vocab_size") is None


def evaluate_feature_run(
    path: Path,
    features: Path | None,
    labels: Path | None,
    split: Split | None,
    launch: LaunchEnvironment,
    tell: Callable[[str], object] = lambda line: None,
) -> dict[str, float]:
    """Evaluate a run on features. Every rank of the launch must call; all share each sequence.

    Args:
        path: folder of a run, one of its checkpoints, or an exported classifier.
        features: folder of other features; None: those of the run.
        labels: of these features; None: those of the run.
        split: which of the files; None: validation for the run's own features, else all.
        launch: this process.
        tell: is called with each line about what of the folder is left out, on rank 0.

    Returns:
        the mean loss, the number of sequences, and what else the task reports.

    Raises:
        LongNetError: no such run, checkpoint or file, or one that does not fit; on all ranks.
    """

    def opened() -> tuple[FeatureRun, FeatureBatches]:
        run = FeatureRun.open(path)
        return run, run.batches(features, labels, split)

    store = meeting_store(launch, MEETING_TIME)
    run, batches = agreed(store, launch, "evaluate", opened, lambda part: part[0].facts(part[1]))
    for line in batches.features.omissions() if launch.rank == 0 else ():
        tell(line)
    with meshed(run.config, launch, store) as (mesh, device):
        task = run.task(mesh.sequence_group).to(device, dtype_of(run.config.precision(device.type)))
        return evaluate_features(task, batches, 1, mesh, device)


def load_encoder(path: Path, device: torch.device) -> tuple[LongNetEncoder, str]:
    """Return an encoder in evaluation mode, and the SHA-256 of its weights.

    Args:
        path: folder that ``longnet convert`` or ``longnet export`` wrote, a run on features, or one of its checkpoints.
        device: where to put it.

    Raises:
        LongNetError: there is none.
    """
    if (path / CONFIG_FILE).is_file() or not is_feature_run(path):
        model = from_pretrained(path, device)
        if not isinstance(model, LongNetEncoder):
            raise ConfigError(f"{path} holds a language model and no encoder; convert or train one")
        return model, sha256_of(path / WEIGHTS_FILE)
    run = FeatureRun.open(path)
    return run.task().encoder.to(device), run.state.weights_sha256


def export_feature_run(path: Path, output: Path, precision: Precision) -> None:
    """Write the encoder of a run into a folder of its own, with the head of its task and the names of its classes.

    Args:
        path: folder of a run on features, or one of its checkpoints.
        output: new, or empty.
        precision: of the weights.

    Raises:
        LongNetError: no such run, or the output cannot be written.
    """
    run = FeatureRun.open(path)
    save_task(run.task().to(dtype_of(precision)), run.classes, output)


@dataclass(frozen=True)
class FeatureRun:
    """A FeatureRun is the folder of a run on features, and one of its checkpoints; or an exported classifier.

    Attributes:
        folder: of the run.
        config: of the run; that of an export knows no features.
        checkpoint: folder of the checkpoint; of an export its own folder.
        state: of the checkpoint.
        classes: names of the classes; empty of a task without.
    """

    folder: RunFolder
    config: Config
    checkpoint: Path
    state: CheckpointState
    classes: list[str]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the configuration and the checkpoint's state.

        Raises:
            LongNetError: there is no such run, or it is damaged.
        """
        if is_exported_encoder(path):
            return cls._exported(path)
        checkpoint = newest_checkpoint(path)
        folder = RunFolder(checkpoint.parent.parent)
        config = folder.config()
        if config.data.features is None:
            raise ConfigError(f"{path} is a run on text, which has no features; give one with data.features")
        return cls(folder, config, checkpoint, read_state(checkpoint, config.model), folder.classes())

    @classmethod
    def _exported(cls, path: Path) -> Self:
        """Take a classifier that ``longnet export`` or ``examples/finetune_slides.py`` wrote."""
        classes = read_classes(path)
        model = EncoderConfig(**read_model_config(path)).model_dump(mode="json")
        data = {"features": str(path), "task": "classification"}
        values = {"data": data, "train": {"output_dir": str(path), "steps": 1}, "model": model}
        try:
            sha256 = {name: sha256_of(path / name) for name in (WEIGHTS_FILE, HEAD_FILE)}
        except OSError as error:
            raise CheckpointError(f"{path} is no exported classifier: {error}; export it again") from None
        state = CheckpointState(step=1, tokens=0, model=model, sha256=sha256, versions={})
        return cls(RunFolder(path), parse_config(values), path, state, classes)

    @property
    def is_exported(self) -> bool:
        """Say whether it is an exported classifier, which has no features of its own."""
        return self.checkpoint == self.folder.path

    def batches(self, features: Path | None, labels: Path | None, split: Split | None) -> FeatureBatches:
        """Return the sequences of a split; arguments as in :func:`evaluate_feature_run`."""
        data = self.config.data
        if self.is_exported and (features is None or labels is None):
            raise ConfigError(
                f"{self.folder.path} is an exported classifier, which has no features of its own; give a folder and "
                "its labels: --data FOLDER --labels FILE, or classify files without labels with longnet predict"
            )
        if features is not None:
            if self.classes and labels is None:
                raise ConfigError(
                    f"the run classifies features, so those in {features} need labels; give --labels FILE, or classify "
                    "them with longnet predict"
                )
            data = data.model_copy(
                update={"features": features, "labels": labels, "validation_share": 0.0, "validation_names": None}
            )
        elif labels is not None:
            data = data.model_copy(update={"labels": labels})
        model = encoder_of(self.config)
        found = FeatureSet.open(data, model, self.classes)
        names = found.names(split or ("validation" if features is None else "all"))
        return FeatureBatches(found, names, 1, self.config.train.seed, model.cls_token)

    def task(self, group: dist.ProcessGroup | None = None) -> FeatureTask:
        """Return the trained encoder with its head, in evaluation mode, float32.

        Raises:
            CheckpointError: the weights are missing or damaged.
        """
        data = self.config.data
        encoder = LongNetEncoder(encoder_of(self.config), group=group, overlap=self.config.parallel.overlap)
        task: FeatureTask = FEATURE_TASKS[data.feature_task](encoder, len(self.classes), data.mask_share)
        if self.is_exported:
            encoder.load_state_dict(from_pretrained(self.checkpoint).state_dict())
            load_head(task, self.checkpoint)
        else:
            load_weights(self.checkpoint, task)
        return task.eval()

    def facts(self, batches: FeatureBatches) -> dict[str, str]:
        """Return what must be equal on all ranks: model, weights, files and code."""
        facts: dict[str, Any] = {f"the version of {name}": version for name, version in code_versions().items()}
        facts |= batches.features.fingerprint() | {"the files": digest_of(batches.names)}
        return facts | {"the checkpoint": digest_of(self.state.sha256)}
