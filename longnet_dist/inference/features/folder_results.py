"""A result for every file of a folder, in one output that an interrupted command goes on with."""

from __future__ import annotations

import re
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from torch import Tensor
from tqdm import tqdm

from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.data.features.feature_files import FeatureFile, feature_files, other_files
from longnet_dist.data.features.feature_set import misfit
from longnet_dist.errors import CheckpointError, DataError, LongNetError, ShapeError
from longnet_dist.machine import check_writable_file

SECONDS_BETWEEN_WRITES = 60.0


class ResultsFile(ABC):
    """A ResultsFile keeps a tensor for each name, and what they were made with.

    Args:
        path: of the file.
        made_with: what results must have in common, by name.

    Attributes:
        command: that writes such files.
    """

    command: ClassVar[str]

    def __init__(self, path: Path, made_with: dict[str, str]) -> None:
        self.path, self.made_with = path, made_with

    def read(self) -> dict[str, Tensor]:
        """Return the results that the file has already.

        Raises:
            CheckpointError: it is damaged, or was made with something else.
            ConfigError: it cannot be written.
        """
        check_writable_file(self.path, f"--output={self.path}")
        if not self.path.exists():
            return {}
        try:
            found, results = self._read()
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise CheckpointError(
                f"{self.path} is no file that {self.command} wrote, or is damaged: {error}; use another output"
            ) from None
        for name, value in self.made_with.items():
            if found.get(name) != value:
                there, here = (f"{name}={_short(x)}" for x in (found.get(name), value))
                raise CheckpointError(f"{self.path} was made with {there}, but here {here}; use another output")
        return results

    def write(self, results: dict[str, Tensor]) -> None:
        """Replace the file, which others see in its old or its new state only.

        Raises:
            LongNetError: it cannot be written.
        """
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(results, partial)
            partial.replace(self.path)
        except (OSError, ValueError) as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise LongNetError(f"cannot write {self.path}: {error}") from None

    @abstractmethod
    def _read(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Return what the results were made with, and the results."""

    @abstractmethod
    def _write(self, results: dict[str, Tensor], partial: Path) -> None:
        """Write the results into a file."""


def add_results(
    folder: Path, model: EncoderConfig, output: ResultsFile, compute: Callable[[FeatureFile], Tensor]
) -> tuple[int, list[str]]:
    """Compute what an output lacks of the files of a folder.

    The output is written every minute, at the end, and on an interrupt.

    Args:
        folder: with features, see :mod:`longnet_dist.data.features.feature_files`.
        model: that is to take the features.
        output: what it has is not computed again.
        compute: returns the result of a file, on the CPU.

    Returns:
        The number of new results; and for people, what was left out and warnings, a line each.

    Raises:
        LongNetError: no such folder, an output that cannot be continued, or, at the end, files that failed.
    """
    files, results, failed, warned = feature_files(folder), output.read(), list[str](), list[tuple[str, str]]()
    before, written = len(results), time.monotonic()
    try:
        for name, path in tqdm(files.items(), unit="file", disable=None, leave=False):
            if name in results:
                continue
            try:
                with warnings.catch_warnings(record=True) as found:
                    warnings.simplefilter("always", UserWarning)
                    file = FeatureFile.of(path)
                    if fault := misfit(file, model):
                        raise DataError(fault)
                    results[name] = compute(file)
                warned += [(path.name, str(warning.message)) for warning in found]
            except (DataError, ShapeError) as error:
                failed.append(f"{path.name}: {error}")
            if time.monotonic() - written > SECONDS_BETWEEN_WRITES:
                output.write(results)
                written = time.monotonic()
    finally:
        if len(results) > before:
            output.write(results)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(files)} files have no result; mend them or take them away, and give the same "
            "command again:\n" + "\n".join(failed)
        )
    return len(results) - before, other_files(folder) + _counted(warned)


def _short(value: object) -> str:
    """Return a value as people compare it; of a checksum the first digits."""
    text = str(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _counted(warned: list[tuple[str, str]]) -> list[str]:
    """Return one line for each kind of warning: how many files it came for, and the first."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for name, message in warned:
        kinds.setdefault(re.sub(r"\d+", "", message), []).append((name, message))
    return [
        f"warning for {len({name for name, _ in found})} files, first {found[0][0]}: {found[0][1]}"
        for found in kinds.values()
    ]
