"""Kinds of experiments, each in a file of its own: how a run is measured, and what its table and picture show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.errors import ConfigError
from longnet_dist.experiments.plan import Experiment, Run
from longnet_dist.registry import Registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]


class Settings(BaseModel):
    """Settings say how a kind of experiment measures a run; a file's keys must be those of the kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Kinds = TypeVar("Kinds", bound=Settings)


class Kind:
    """Say how runs are made, measured, tabled and drawn.

    Attributes:
        trains: whether a run is trained before it is measured.
    """

    trains: bool = True

    @staticmethod
    def prepare(run: Run) -> None:
        """Make what the training of a run needs."""

    @staticmethod
    def measure(run: Run, launch: LaunchEnvironment) -> dict[str, Any]:
        """Return what is measured of a run, as JSON values.

        Args:
            run: which has been trained if the kind trains.
            launch: this process, which is alone.
        """
        raise NotImplementedError

    @staticmethod
    def table(experiment: Experiment, records: Sequence[Record]) -> list[list[str]]:
        """Return the rows of a table, the header first."""
        raise NotImplementedError

    @staticmethod
    def draw(experiment: Experiment, records: Sequence[Record], subtitle: str) -> Figure:
        """Return the picture; ``subtitle`` names the hardware."""
        raise NotImplementedError


KINDS: Registry[type[Kind]] = Registry("kind of experiment", __name__)


def settings_of(kind: type[Kinds], values: Mapping[str, Any]) -> Kinds:
    """Check the settings of a kind.

    Raises:
        ConfigError: a key is unknown or missing, or a value is invalid.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ConfigError(f"the settings of the experiment are not valid: {'; '.join(lines)}") from None


class Value(NamedTuple):
    """A Value is a mean over seeds, and their standard deviation; None with one seed."""

    mean: float
    spread: float | None

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "–"
        # One digit is all that a spread over a few seeds says; as a number, since "7e+01" is hard to read.
        return f"{self.mean:.4g}" if self.spread is None else f"{self.mean:.4g} ± {float(f'{self.spread:.1g}'):g}"


def over_seeds(values: Iterable[float]) -> Value:
    """Return the mean of the values of all seeds and their standard deviation."""
    numbers = list(values)
    if not numbers:
        return Value(math.nan, None)
    return Value(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


def by_run(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records of all seeds of each run, in the order of the records."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["run"], []).append(record)
    return found


def value_of(records: Sequence[Record], read: Callable[[Record], float | None]) -> Value:
    """Return the value that ``read`` finds in the records of all seeds; those without one do not count."""
    return over_seeds(value for value in map(read, records) if value is not None)
