"""An experiment is read from its YAML file: its runs, how they are measured, and what is drawn."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from longnet_dist.config.loading import parse_config, read_yaml, set_override
from longnet_dist.config.schema import Config
from longnet_dist.errors import ConfigError
from longnet_dist.experiments import experiment_names

SECTIONS = ("model", "data", "train", "parallel", "deepspeed")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunPlan(_Strict):
    """A RunPlan says in what a run differs from the other runs of its experiment.

    Attributes:
        about: what the run is, in a few words.
        series: which runs are joined by a line; the run's own name if not given.
        seeds: a run is made for each; their spread is the error bar.
        init: another run, ``name`` or ``experiment/name``, with whose weights it begins.
        trained: a run ``experiment/name`` whose training is this one's too; it is trained once, and measured here as
            this experiment does. Sections of a configuration are those of that run.
        model, data, train, parallel, deepspeed: sections of a configuration.
        settings: of this run's measurement.
    """

    about: str = ""
    series: str = ""
    seeds: tuple[int, ...] = (0,)
    init: str | None = None
    trained: str | None = None
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    train: dict[str, Any] = {}
    parallel: dict[str, Any] = {}
    deepspeed: dict[str, Any] = {}
    settings: dict[str, Any] = {}

    @property
    def sections(self) -> dict[str, Any]:
        """Return the sections of the configuration."""
        return {name: getattr(self, name) for name in SECTIONS if getattr(self, name)}


class Experiment(_Strict):
    """An Experiment is what its YAML file says.

    Attributes:
        name: of the file.
        title: of table and picture.
        about: what is asked, and from which figure or table of the paper.
        kind: how runs are measured, tabled and drawn: a name of ``experiments/kinds``.
        settings: of the kind.
        base: sections of a configuration that all runs share.
        runs: the runs, by name.
        smoke: whether this is the size that runs on a CPU within seconds.
    """

    name: str
    title: str
    about: str
    kind: str
    settings: dict[str, Any] = {}
    base: dict[str, Any] = {}
    runs: dict[str, RunPlan]
    smoke: bool = False

    @classmethod
    def read(cls, name: str, smoke: bool = False) -> Self:
        """Read an experiment that this package brings.

        Args:
            name: of its file, without ``.yaml``.
            smoke: whether to read its smallest size: the file's section ``smoke`` replaces keys of the others, and
                ``keep`` there names the runs that are left.

        Raises:
            ConfigError: there is no such experiment, or its file has unknown keys.
        """
        if name not in (names := experiment_names()):
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise ConfigError(f"there is no experiment {name!r}: use one of {', '.join(names)}{hint}")
        values = read_yaml(files("longnet_dist.experiments") / f"{name}.yaml")
        small = values.pop("smoke", {})
        if smoke:
            kept = small.pop("keep", list(values["runs"]))
            values["runs"] = {run: values["runs"][run] or {} for run in kept}
            values = merged(values, small)
        values["runs"] = {run: fields or {} for run, fields in values["runs"].items()}
        try:
            return cls.model_validate(values | {"name": name, "smoke": smoke})
        except ValidationError as error:
            lines = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
            raise ConfigError(f"the experiment {name} is not valid: {'; '.join(lines)}") from None

    def folder(self, output: Path) -> Path:
        """Return the folder of the experiment's runs and results below ``output``."""
        return output / (f"{self.name}-smoke" if self.smoke else self.name)


class Run:
    """A Run is one training and measurement of an experiment: a :class:`RunPlan` with one seed.

    Args:
        experiment: whose run it is.
        name: of the run.
        seed: of weights and samples.
        output: folder of all experiments.
        overrides: ``section.key=value`` words that replace keys of all runs.
        data: token file; None: that of the configuration.
        vocab_size: ids of the token file, for models that do not say; None: unknown.

    Attributes:
        trained_as: experiment and name of the training; those of this run, unless its plan says otherwise.
        values: nested values of the configuration, without folders, seed and token file.
        settings: of the measurement.

    Raises:
        ConfigError: the configuration is not valid.
    """

    def __init__(
        self,
        experiment: Experiment,
        name: str,
        seed: int,
        output: Path,
        overrides: Sequence[str] = (),
        data: Path | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.experiment, self.name, self.seed, self.output, self.data = experiment, name, seed, output, data
        self.plan = experiment.runs[name]
        self.settings = experiment.settings | self.plan.settings
        self.trained_as, plan = self._training()
        self.values = copy.deepcopy(merged(self.trained_as[0].base, plan.sections))
        for word in overrides:
            set_override(self.values, word)
        if vocab_size is not None:
            self.values = merged({"model": {"vocab_size": vocab_size}}, self.values)

    def _training(self) -> tuple[tuple[Experiment, str], RunPlan]:
        if self.plan.trained is None:
            return (self.experiment, self.name), self.plan
        experiment, _, name = self.plan.trained.partition("/")
        other = Experiment.read(experiment, self.experiment.smoke)
        if self.plan.sections or other.runs.get(name) is None:
            raise ConfigError(
                f"the run {self.name} is trained as {self.plan.trained}, which must be a run of that experiment, and "
                f"has no sections of its own; it has {', '.join(self.plan.sections) or 'none'}, and {experiment} has "
                f"the runs {', '.join(other.runs)}"
            )
        return (other, name), other.runs[name]

    @property
    def key(self) -> str:
        """Return the name of the run with its seed."""
        return f"{self.name}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Return the folder of the trained run."""
        experiment, name = self.trained_as
        return experiment.folder(self.output) / f"{name}-seed{self.seed}"

    @property
    def record(self) -> Path:
        """Return the file of the run's measurement."""
        return self.experiment.folder(self.output) / "results" / f"{self.key}.json"

    @property
    def identity(self) -> dict[str, Any]:
        """Return what makes two runs the same, as JSON gives it back: configuration and settings."""
        values: dict[str, Any] = json.loads(json.dumps({"config": self.values, "settings": self.settings}))
        return values

    @property
    def init_folder(self) -> Path | None:
        """Return the folder of the run with whose weights this one begins; None for none."""
        if self.plan.init is None:
            return None
        other, _, name = self.plan.init.rpartition("/")
        experiment = Experiment.read(other, self.experiment.smoke) if other else self.experiment
        return Run(experiment, name, self.seed, self.output).folder

    def config(self) -> Config:
        """Return the configuration of the training.

        Raises:
            ConfigError: it is not valid.
        """
        train: dict[str, Any] = {"output_dir": str(self.folder), "seed": self.seed}
        if self.init_folder is not None:
            train["init"] = str(self.init_folder)
        data = {} if self.data is None else {"path": str(self.data)}
        return parse_config(merged(self.values, {"train": train, "data": data}))


def runs_of(experiment: Experiment, names: Sequence[str], output: Path, **options: Any) -> Iterator[Run]:
    """Yield the runs of an experiment, of each seed; those with whose weights others begin stand first in its file.

    Args:
        experiment: whose runs.
        names: of the wanted runs, or with their seeds, such as ``full-2k-seed1``; all if empty.
        output: folder of all experiments.
        options: further arguments of :class:`Run`.

    Raises:
        ConfigError: there is no such run.
    """
    keys = [(name, seed) for name, plan in experiment.runs.items() for seed in plan.seeds]
    for name in names:
        if name not in {run for run, _ in keys} | {f"{run}-seed{seed}" for run, seed in keys}:
            raise ConfigError(
                f"the experiment {experiment.name} has no run {name!r}; it has {', '.join(experiment.runs)}"
            )
    for name, seed in keys:
        if not names or name in names or f"{name}-seed{seed}" in names:
            yield Run(experiment, name, seed, output, **options)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values in which those of ``above`` replace those of ``below``, key by key."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result
