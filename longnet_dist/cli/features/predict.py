"""``longnet predict``: the class of every sequence of features in a folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from longnet_dist.cli.features.embed import add_folder, device_and_dtype, report
from longnet_dist.cli.program.parser import CommandParser

SUMMARY = "predict the class of each file in a folder of features, with probabilities"
EXAMPLES = """\
examples:
  longnet predict runs/slides new --output predictions.csv
  longnet predict runs/slides/checkpoints/step_00000500 new --output predictions.csv
  longnet predict exported new --output predictions.csv --precision bf16

MODEL is the folder of a run that classifies features (data.labels), whose newest checkpoint is taken, or one of its
checkpoints. It may also be an exported classifier, as longnet export and examples/finetune_slides.py write it.

FOLDER has a file for each sequence, as longnet embed takes it. The output is a CSV file with the columns name, label
and probability_CLASS for each class. OUTPUT.json says which model it is of. An output that exists is continued.
To compare with known labels: longnet evaluate MODEL --data FOLDER --labels FILE
"""


def main(arguments: Sequence[str]) -> None:
    """Predict as the command line says.

    Args:
        arguments: the words behind ``longnet predict``.

    Raises:
        LongNetError: no such model or folder, or files for which nothing can be predicted.
    """
    options = parser().parse_args(arguments)

    from longnet_dist.inference.features.prediction import predict_folder

    new, (counts, *lines) = predict_folder(options.model, options.folder, options.output, *device_and_dtype(options))
    report(f"{new} new predictions in {options.output}, which has {counts}", lines)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``longnet predict``."""
    result = CommandParser("predict", "Predict the class of every sequence of features in a folder.", EXAMPLES)
    result.add_argument("model", type=Path, metavar="MODEL", help="a run that classifies features, or its export")
    add_folder(result, "CSV; continued if it exists")
    return result
