"""An encoder with the head of its task as a folder of its own: a head and names of classes beside the encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longnet_dist.checkpoint.run_folder import write_text
from longnet_dist.errors import CheckpointError, ConfigError
from longnet_dist.model.feature_tasks import FeatureTask
from longnet_dist.model.pretrained import save_pretrained

HEAD_FILE, CLASSES_FILE = "head.safetensors", "classes.json"
_ENCODER = "encoder."


def save_task(task: FeatureTask, classes: Sequence[str], output: Path) -> None:
    """Write the encoder of a task into a folder, with the head and the names of the classes.

    Args:
        task: on one device, not sharded.
        classes: names of the classes, in the order of the head's outputs; empty for a task without.
        output: new, or empty.

    Raises:
        ConfigError: the output holds something, or cannot be written.
    """
    save_pretrained(task.encoder, output)
    head = {name: x.detach().contiguous() for name, x in task.state_dict().items() if not name.startswith(_ENCODER)}
    try:
        save_file(head, output / HEAD_FILE)
        if classes:
            write_text(output / CLASSES_FILE, json.dumps(list(classes), ensure_ascii=False))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write the head to {output}: {error}") from None


def read_classes(folder: Path) -> list[str]:
    """Return the names of the classes of an exported classifier.

    Raises:
        ConfigError: the folder has an encoder alone, or one of a task without classes.
        CheckpointError: the file is damaged.
    """
    if not (folder / CLASSES_FILE).is_file():
        kind = "of a task without classes" if (folder / HEAD_FILE).is_file() else "without a head"
        raise ConfigError(
            f"{folder} is an encoder {kind}, which cannot classify; train a classifier with data.labels=FILE "
            f"train.init={folder}, write vectors with longnet embed, or evaluate the run that it comes from"
        )
    try:
        classes = json.loads((folder / CLASSES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {folder / CLASSES_FILE}: {error}") from None
    if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{folder / CLASSES_FILE} must be a JSON list of two names or more, but is {classes}")
    return classes


def load_head(task: FeatureTask, folder: Path) -> None:
    """Give a task the head of a folder.

    Raises:
        CheckpointError: the file is missing, damaged, or of another task.
    """
    own = {name: x for name, x in task.state_dict().items() if not name.startswith(_ENCODER)}
    try:
        head: dict[str, Tensor] = load_file(folder / HEAD_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {folder / HEAD_FILE}: {error}") from None
    shapes, wanted = ({name: list(x.shape) for name, x in tensors.items()} for tensors in (head, own))
    if shapes != wanted:
        raise CheckpointError(
            f"{folder / HEAD_FILE} has {shapes}, but {task.num_classes} classes in {CLASSES_FILE} and the encoder need "
            f"{wanted}; export the classifier again"
        )
    task.load_state_dict(head, strict=False)
