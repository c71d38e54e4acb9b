"""``longnet plan``: what a run will need, by arithmetic."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from longnet_dist.cli.program.parser import CommandParser, above_zero, positive

if TYPE_CHECKING:
    from longnet_dist.config.schema import Config
    from longnet_dist.estimate.devices import Device
    from longnet_dist.estimate.remedies import Found
    from longnet_dist.estimate.run_estimate import Estimate

SUMMARY = "predict the memory, time and longest sequence of a training run"
DEFAULT_DEVICE = "h100"
MOST_RANKS = 1024
EXAMPLES = """\
CONFIG is a YAML file or the name of a packaged configuration: {names}.

examples:
  longnet plan paper --device h100
  longnet plan paper data.sequence_length=1048576 train.activation_checkpointing=selective
  longnet plan my.yaml --gpus 8 parallel.sequence=4 --json
  longnet plan my.yaml --gpus 2 --device h200 --optimize --host-memory 256

Everything is a prediction by arithmetic: nothing is allocated and no GPU is needed.
"""


def main(arguments: Sequence[str]) -> None:
    """Print a plan as the command line says.

    Args:
        arguments: the words behind ``longnet plan``.

    Raises:
        ConfigError: a mistake in the command line or the configuration.
    """
    options = parser().parse_intermixed_args(arguments)
    plan = _estimate(options)

    from longnet_dist.estimate.remedies import fastest
    from longnet_dist.estimate.table import fastest_lines, remedy_lines, scaling_lines, table
    from longnet_dist.telemetry.json_lines import json_text

    found = fastest(plan) if options.optimize else []
    scaled = [plan.on_ranks(1 << power) for power in range(MOST_RANKS.bit_length())] if options.scaling else []
    if options.json:
        values = plan.to_json()
        values |= {"optimized": _plain(found)} if options.optimize else {}
        values |= {"scaling": [{"ranks": p.layout.num_ranks, **_numbers(p)} for p in scaled]} if options.scaling else {}
        print(json_text(values))
        return
    print(table(plan))
    if options.optimize:
        print(f"\n{fastest_lines(found)}")
    elif not plan.fits():
        print(remedy_lines(plan))
    if scaled:
        print(f"\n{scaling_lines(scaled)}")


def _estimate(options: argparse.Namespace) -> Estimate:
    """Return the estimate of the run and the machines that the command line names."""
    import torch

    from longnet_dist.attention.kernels.planning import planned_device
    from longnet_dist.config.loading import load_config
    from longnet_dist.config.packaged import find_config, read_once
    from longnet_dist.data.features.feature_set import sized
    from longnet_dist.estimate.devices import GIB
    from longnet_dist.estimate.layout import RunLayout
    from longnet_dist.estimate.run_estimate import Estimate
    from longnet_dist.machine import host_memory_bytes

    alone = options.config.startswith("model.path=")
    words = [options.config, *options.settings] if alone else options.settings
    with read_once(None if alone else options.config) as file:
        given = load_config(None if file is None else find_config(file), words)
    config = sized(given, partial(print, file=sys.stderr))
    device, here = _device(options.device)
    layout = RunLayout.of(config, options.gpus or _ranks(config), device.type)
    if here and device.type == "cuda":
        device = planned_device(torch.device("cuda", 0), layout)
    gpus_per_host = options.gpus_per_host or device.gpus_per_host
    fabric = device.fabric if options.fabric is None else 1e9 * options.fabric
    device = replace(device, gpus_per_host=gpus_per_host, fabric=fabric)
    local_ranks = min(layout.num_ranks, gpus_per_host)
    limit = host_memory_bytes() if here else None
    if options.host_memory is not None:
        limit = int(options.host_memory * GIB)
    return Estimate.of(layout, device, local_ranks, limit)


def _plain(found: Found) -> list[dict[str, Any]]:
    """Return plain values of what a search found."""
    return [{"settings": words} | _numbers(estimate) for words, estimate in found]


def _numbers(estimate: Estimate) -> dict[str, Any]:
    keys = ("peak_gpu_bytes", "peak_host_bytes", "step_seconds", "tokens_per_second", "mfu")
    return {key: getattr(estimate, key) for key in keys}


def _device(name: str | None) -> tuple[Device, bool]:
    """The device, and whether it is of this machine."""
    import torch

    from longnet_dist.estimate.devices import device_of, named_device

    if name is not None:
        return named_device(name), name == "cpu"
    if torch.cuda.is_available():
        return device_of(torch.device("cuda", 0)), True
    return named_device(DEFAULT_DEVICE), False


def _ranks(config: Config) -> int:
    """As many as the mesh asks for; what is left open is 1."""
    data, sequence = config.parallel.data, config.parallel.sequence
    return (data if isinstance(data, int) else 1) * (sequence if isinstance(sequence, int) else 1)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``longnet plan``."""
    from longnet_dist.config.packaged import run_names
    from longnet_dist.estimate.devices import GPUS

    what = "Parameters, FLOPs, memory, step time and the longest sequence of a training run."
    result = CommandParser("plan", what, EXAMPLES.format(names=", ".join(run_names())))
    result.add_argument("config", metavar="CONFIG", help="a configuration; may be left out before model.path=FOLDER")
    result.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace its own")
    result.add_argument("--gpus", type=positive, metavar="n", help="ranks (default parallel.data × parallel.sequence)")
    names = ", ".join(device.name for device in GPUS)
    result.add_argument("--device", metavar="NAME", help=f"cpu or one of {names} (default: this machine's, else h100)")
    result.add_argument("--optimize", action="store_true", help="search the memory options for the fastest that fits")
    result.add_argument(
        "--scaling", action="store_true", help=f"plan 1 to {MOST_RANKS} ranks, with as many tokens each"
    )
    result.add_argument("--gpus-per-host", type=positive, metavar="n", help="GPUs of a machine (default 8)")
    memory = "of a machine with GPUs (default: this machine's, or no limit for a named device)"
    result.add_argument("--host-memory", type=above_zero, metavar="GiB", help=memory)
    fabric = "from a GPU to other machines, one way (default: of the device's usual machine)"
    result.add_argument("--fabric", type=above_zero, metavar="GB/s", help=fabric)
    result.add_argument("--json", action="store_true", help="print a JSON object")
    return result
