"""Predicting the class of every sequence in a folder."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from longnet_dist.checkpoint.identity import digest_of
from longnet_dist.checkpoint.run_folder import write_text
from longnet_dist.data.features.feature_files import FeatureFile
from longnet_dist.errors import ConfigError
from longnet_dist.inference.features.embedding import encode_file
from longnet_dist.inference.features.feature_runs import FeatureRun
from longnet_dist.inference.features.folder_results import ResultsFile, add_results
from longnet_dist.model.feature_tasks import FeatureTask
from longnet_dist.model.feature_tasks.classification import Classification


def predict_folder(
    model: Path, folder: Path, output: Path, device: torch.device, dtype: torch.dtype
) -> tuple[int, list[str]]:
    """Write the class of each file of a folder into a CSV file, with the probability of every class.

    The columns are ``name``, ``label`` and ``probability_CLASS`` for each class. ``OUTPUT.json``, in the same folder,
    says what they were made with. A file that exists, of the same model, is continued. A file that cannot be read is
    left out and named at the end.

    Args:
        model: a run that classifies features, one of its checkpoints, or an exported classifier.
        folder: with features, see :mod:`longnet_dist.data.features.feature_files`.
        output: the CSV file.
        device, dtype: where and how precisely to compute.

    Returns:
        The number of new predictions; and for people, how many files have each label, what was left out and warnings,
        a line each.

    Raises:
        LongNetError: no such model or folder, an output of another model, or, at the end, files that failed.
    """
    run = FeatureRun.open(model)
    task: FeatureTask = run.task()
    if not isinstance(task, Classification):
        raise ConfigError(
            f"{model} learned {run.config.data.feature_task}, which has no classes; train a classifier with "
            f"data.labels=FILE train.init={model}, or write vectors with longnet embed"
        )
    task = task.to(device, dtype)
    made_with = {"weights": digest_of(run.state.sha256), "classes": json.dumps(run.classes), "dtype": str(dtype)}
    table = _Predictions(output, made_with)
    new, lines = add_results(folder, task.encoder.config, table, lambda file: _probabilities(task, file))
    counts = Counter(run.classes[int(x.argmax())] for x in table.read().values())
    return new, [", ".join(f"{counts[name]} {name}" for name in run.classes), *lines]


@torch.inference_mode()
def _probabilities(task: Classification, file: FeatureFile) -> Tensor:
    logits: Tensor = task.head(encode_file(task.encoder, file).pooled[0])
    return logits.float().softmax(-1).cpu().clone()


class _Predictions(ResultsFile):
    command: ClassVar[str] = "longnet predict"

    @property
    def classes(self) -> list[str]:
        return list(json.loads(self.made_with["classes"]))

    @property
    def columns(self) -> list[str]:
        return ["name", "label", *(f"probability_{name}" for name in self.classes)]

    @property
    def record(self) -> Path:
        """Return the file that says what the predictions were made with."""
        return self.path.with_name(f"{self.path.name}.json")

    def _read(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        found = dict(json.loads(self.record.read_text(encoding="utf-8")))
        if found.get("classes") != self.made_with["classes"]:
            return found, {}
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                columns, *rows = csv.reader(file)
        except csv.Error as error:
            raise ValueError(str(error)) from None
        if any(len(row) != len(self.columns) for row in rows) or columns != self.columns:
            raise ValueError(f"its columns are not {', '.join(self.columns)}")
        return found, {name: torch.tensor([float(x) for x in numbers]) for name, _, *numbers in rows}

    def _write(self, results: dict[str, Tensor], partial: Path) -> None:
        classes = self.classes
        write_text(self.record, json.dumps(self.made_with, indent=2, ensure_ascii=False) + "\n")
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.columns)
            for name, shares in sorted(results.items()):  # nine digits are those of a float32
                writer.writerow([name, classes[int(shares.argmax())], *(f"{share:.9g}" for share in shares.tolist())])
