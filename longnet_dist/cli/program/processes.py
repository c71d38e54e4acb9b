"""How many ranks a command starts, and how a process with this package is started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import longnet_dist

# Of the launchers that comm/launch_env.py detects: set where other ranks may wait for this one.
LAUNCHER_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class Processes:
    """The ranks that a command starts where no launcher has started it.

    Attributes:
        command: what each rank runs: the words behind ``longnet``.
        asked: their number as the command line says it, if it does.
        on_cpus: their number else, where there is no GPU.
        each_gpu: whether there is else one for each GPU, or a single one.
        starts: whether ranks are started at all; else this process is the only one.
    """

    command: list[str]
    asked: int | None = None
    on_cpus: int = 1
    each_gpu: bool = True
    starts: bool = True


def python_options() -> list[str]:
    """Return the options of Python for a process that shall find this package as this process has.

    It imports nothing from the current folder, unless the package itself was found there.
    """
    here = Path(longnet_dist.__file__).resolve().parent.parent == Path.cwd().resolve()
    return ["-u"] if here else ["-u", "-P"]
