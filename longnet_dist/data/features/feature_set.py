"""A folder of features as the data of a run: which files train, which validate, and their classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.config.schema import Config, DataConfig
from longnet_dist.data.features.feature_files import COORDINATES, FeatureFile, feature_files, other_files
from longnet_dist.data.features.labels import Labels, read_labels
from longnet_dist.errors import ConfigError, DataError

Split = Literal["train", "validation", "all"]
SHOWN_FAULTS = 5


@dataclass(frozen=True)
class FeatureSet:
    """A FeatureSet is the same on every rank that sees the same files.

    Attributes:
        path: folder of the files.
        files: by name, in alphabetical order; with classes those that have a label.
        classes: names of the classes, in alphabetical order; empty without labels.
        labels: number of the class of each file; empty without labels.
        validation: names of the files that are kept for validation.
        left_out: names of files without a label.
        notes: for people, what else is left out, a line each.
    """

    path: Path
    files: dict[str, FeatureFile]
    classes: tuple[str, ...]
    labels: dict[str, int]
    validation: frozenset[str]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, data: DataConfig, model: EncoderConfig, classes: Sequence[str] = ()) -> Self:
        """Read the headers of all files, the labels, and the names that are kept for validation.

        Args:
            data: of the run.
            model: that is to take the features.
            classes: of a trained model, of which labels must be; empty: they follow from the labels.

        Raises:
            DataError: naming the files that cannot be used, labels of no file, or a split without files.
            ConfigError: the task needs labels, or takes none.
        """
        assert data.features is not None
        paths = feature_files(data.features)
        labels = Labels((), {}, ())
        names = list(paths)
        if data.feature_task == "classification":
            if data.labels is None:
                raise ConfigError(
                    "data.task=classification needs the classes of the files; give data.labels, a CSV file"
                )
            labels = read_labels(data.labels, paths, classes)
            names = list(labels.numbers)
        elif data.labels is not None:
            raise ConfigError(f"data.task={data.feature_task} takes no labels, but data.labels is given; leave it out")
        files = _opened({name: paths[name] for name in names}, model)
        validation = _validation(data, files, labels.numbers)
        notes = (*labels.notes, *other_files(data.features))
        return cls(data.features, files, labels.classes, labels.numbers, validation, labels.left_out, notes)

    def names(self, split: Split) -> list[str]:
        """Return the names of the files of a split, in alphabetical order.

        Raises:
            DataError: there is none.
        """
        found = [name for name in self.files if split == "all" or (name in self.validation) == (split == "validation")]
        if not found:
            raise DataError(
                f"the {split} split of {self.path} has none of its {len(self.files)} files; train with another "
                "data.validation_share (0 needs train.validate_every=0) or data.validation_names, or evaluate with "
                "--split all"
            )
        return found

    @property
    def longest(self) -> int:
        """Return the rows of the longest file."""
        return max(file.rows for file in self.files.values())

    def fingerprint(self) -> dict[str, str]:
        """Return what a run must find again: the list of files with their shapes and sizes, labels, and the split."""
        files = (f"{name} {f.rows} {f.channels} {f.coordinates} {f.size}" for name, f in self.files.items())
        labels = (f"{name} {self.classes[number]}" for name, number in self.labels.items())
        return {
            "list of feature files": _digest(files),
            "labels": _digest(sorted(labels)),
            "validation files": _digest(sorted(self.validation)),
        }

    def report(self) -> str:
        """Return how many files there are, for people."""
        validation = len(self.validation)
        rows = sorted(file.rows for file in self.files.values())
        text = (
            f"features: {len(self.files) - validation} files for training and {validation} for validation, "
            f"{rows[0]:,} to {rows[-1]:,} rows"
        )
        text += f"; classes: {', '.join(self.classes)}" if self.classes else ""
        return "\n".join([text, *self.omissions()])

    def omissions(self) -> list[str]:
        """Return what of the folder and the labels is left out, and why, a line each; for people."""
        first = self.left_out[:1]
        without = [f"left out: {len(self.left_out)} without a label, first {name}" for name in first]
        return [*without, *self.notes]

    def check_unchanged(self) -> None:
        """Check that no file has another size.

        Raises:
            DataError: one has, or is gone.
        """
        for file in self.files.values():
            try:
                size = file.path.stat().st_size
            except OSError as error:
                raise DataError(f"{file.path} is gone: {error.strerror}; put it back and go on") from None
            if size != file.size:
                raise DataError(f"{file.path} has changed from {file.size} to {size} bytes; put the old one back")

    def bytes_per_token(self, split: str) -> None:
        """Return None: rows of features stand for no text."""


def sized(config: Config, tell: Callable[[str], object]) -> Config:
    """Return a configuration whose ``data.sequence_length`` is the rows of the longest file, with its cls row.

    Without ``data.features`` it is returned as it is.

    Args:
        config: of a run.
        tell: is called with what the files are and what is left out, for people.

    Raises:
        DataError, ConfigError: as :meth:`FeatureSet.open`.
    """
    if config.data.features is None:
        return config
    features = FeatureSet.open(config.data, encoder_of(config))
    tell(features.report())
    return config_of(config, features)


def config_of(config: Config, features: FeatureSet) -> Config:
    """Return the configuration with the task and the sequence length of its features."""
    length = features.longest + encoder_of(config).cls_token
    data = config.data.model_copy(update={"sequence_length": length, "task": config.data.feature_task})
    return config.model_copy(update={"data": data})


def encoder_of(config: Config) -> EncoderConfig:
    """Return the model of a run on features."""
    assert isinstance(config.model, EncoderConfig)
    return config.model


def misfit(file: FeatureFile, model: EncoderConfig) -> str:
    """Return why a model cannot take a file, with the remedy; empty if it can."""
    width, places = model.feature_dim or model.dim, model.coordinates
    if file.channels != width:
        return f"{file.path} has {file.channels} channels, but the model takes {width} (model.feature_dim)"
    if model.position_embedding != "sincos" or places == 1 or file.coordinates == places:
        return ""
    has = f"{file.coordinates} coordinates a row" if file.coordinates else "no coordinates"
    how = f"in {file.path.stem}{COORDINATES}, in the same folder" if file.path.suffix == ".npy" else "under coords"
    return f"{file.path} has {has}, but the model needs {places} (model.coordinates); keep them {how}"


def _opened(paths: dict[str, Path], model: EncoderConfig) -> dict[str, FeatureFile]:
    """Read the headers of all files; one error names those that the model cannot take."""
    files, faults = {}, []
    for name, path in paths.items():
        try:
            files[name] = file = FeatureFile.of(path)
        except DataError as error:
            faults.append(str(error))
            continue
        if fault := misfit(file, model):
            faults.append(fault)
    by_place = model.position_embedding == "sincos" and model.coordinates == 1
    if not faults and by_place and len({file.coordinates for file in files.values()}) > 1:
        faults = [f"{name} has {file.coordinates} coordinates a row" for name, file in files.items()]
    if faults:
        more = f"\nand {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise DataError(
            f"{len(faults)} of {len(paths)} files of features cannot be used; mend them or take them away:\n"
            + "\n".join(faults[:SHOWN_FAULTS])
            + more
        )
    return files


def _validation(data: DataConfig, files: dict[str, FeatureFile], labels: dict[str, int]) -> frozenset[str]:
    """Return the names that are kept for validation: those in a file, or a share of each class by hashes of names."""
    if data.validation_names is not None:
        try:
            words = data.validation_names.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read data.validation_names={data.validation_names}: {error}") from None
        names = {word.strip() for word in words if word.strip()}
        if unknown := sorted(names - files.keys()):
            raise DataError(
                f"{data.validation_names} names {unknown[0]}, which is none of the files in {data.features}"
                f"{' with a label' if labels else ''}; name files without their suffix"
            )
        return frozenset(names)
    kept: set[str] = set()
    for number in sorted(set(labels.values())) or [0]:
        of_class = [name for name in files if labels.get(name, 0) == number]
        of_class.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
        kept.update(of_class[: round(data.validation_share * len(of_class))])
    if data.validation_share and not kept and len(files) > 1:
        kept = {min(files, key=lambda name: hashlib.sha256(name.encode()).digest())}
    return frozenset(kept)


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
