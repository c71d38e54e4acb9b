"""Experiments: a YAML file each, whose runs go through the ordinary trainer and evaluation.

This module imports nothing else of the package, so that a command's help names the experiments at once.
"""

from __future__ import annotations

from importlib.resources import files


def experiment_names() -> list[str]:
    """Return the names of the experiments that this package brings."""
    found = files("longnet_dist.experiments").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in found if file.name.endswith(".yaml"))
