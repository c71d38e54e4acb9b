"""How many ranks a command starts, and what each of them runs."""

from __future__ import annotations

from dataclasses import dataclass


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
