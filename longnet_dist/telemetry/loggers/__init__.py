"""Loggers of a run (``train.loggers``), each in a file of its own.

A logger registers a class under its name::

    @LOGGERS.register("console")
    class ConsoleLogger(Logger):
        def log(self, kind, step, fields):
            print(kind, step, fields)

Rank 0 makes one of each and closes them at the end of the run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

from longnet_dist.checkpoint.run_folder import RunFolder
from longnet_dist.errors import ConfigError
from longnet_dist.numerics import log_once
from longnet_dist.registry import Registry

Kind = Literal["train", "validation"]


class Logger:
    """Record the metrics of a run.

    Args:
        folder: of the run.
        last_step: of the checkpoint that the run continues from, 0 for a new run; later records are dropped.
        config: the run's configuration as nested values.

    Attributes:
        package: what must be installed, as pip names it; empty if nothing.
        module: the package's module.
        optional: whether a run goes on without the package, with a message.
    """

    package: str = ""
    module: str = ""
    optional: bool = False

    def __init__(self, folder: RunFolder, last_step: int, config: Mapping[str, Any]) -> None:
        self.folder, self.last_step, self.config = folder, last_step, config

    def log(self, kind: Kind, step: int, fields: Mapping[str, float | None]) -> None:
        """Record the metrics of a step, or of a validation after it; None stands for a number that is not finite."""
        raise NotImplementedError

    def close(self) -> None:
        """Flush what was recorded; nothing is recorded any more."""


LOGGERS: Registry[type[Logger]] = Registry("train.loggers", __name__)


def usable_loggers(names: tuple[str, ...]) -> list[type[Logger]]:
    """Return the loggers of a run, in the order given.

    Raises:
        ConfigError: an unknown name, or a package that is not installed.
    """
    found = []
    for name in names:
        LOGGERS.check(name)
        logger = LOGGERS[name]
        if not logger.module or importlib.util.find_spec(logger.module) is not None:
            found.append(logger)
            continue
        remedy = f"pip install {logger.package}, or leave {name} out of train.loggers"
        if not logger.optional:
            raise ConfigError(f"train.loggers has {name}, which needs the package {logger.package}; {remedy}")
        log_once(f"the run is not recorded by {name}, which needs the package {logger.package}: {remedy}")
    return found
