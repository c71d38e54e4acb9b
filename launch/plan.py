"""What a run will need: launch/plan.py CONFIG.yaml [key=value ...] [--gpus n] [--device h100] [--json]."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from longnet_dist.cli.exit_status import run_cli
from longnet_dist.config.loading import load_config
from longnet_dist.config.schema import Config
from longnet_dist.estimate.devices import GPUS, Device, device_of, host_memory_bytes, named_device
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.run_estimate import Estimate
from longnet_dist.estimate.table import remedy_lines, table

DEFAULT_DEVICE = "h100"
GPUS_OF_A_MACHINE = 8
EXAMPLES = """\
examples:
  python launch/plan.py configs/paper.yaml --device h100
  python launch/plan.py configs/paper.yaml data.sequence_length=1048576 train.activation_checkpointing=selective
  python launch/plan.py configs/paper.yaml --gpus 8 parallel.sequence=4 --json

Everything is a prediction by arithmetic: nothing is allocated and no GPU is needed.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a plan as the command line says.

    Args:
        arguments: the command line without the program's name, by default that of the process.
    """
    options = _parser().parse_intermixed_args(arguments)
    config = load_config(options.config, options.settings)
    device, here = _device(options.device)
    layout = RunLayout.of(config, options.gpus or _ranks(config), device.type)
    local_ranks = min(layout.num_ranks, GPUS_OF_A_MACHINE)
    plan = Estimate.of(layout, device, local_ranks, host_memory_bytes() if here else None)
    if options.json:
        print(json.dumps(plan.to_json()))
    else:
        print(table(plan) + (f"\n{remedy_lines(plan)}" if not plan.fits() else ""))


def _device(name: str | None) -> tuple[Device, bool]:
    """The device, and whether it is of this machine."""
    if name is not None:
        return named_device(name), name == "cpu"
    if torch.cuda.is_available():
        return device_of(torch.device("cuda", 0)), True
    return named_device(DEFAULT_DEVICE), False


def _ranks(config: Config) -> int:
    """As many as the mesh asks for; what is left open is 1."""
    data, sequence = config.parallel.data, config.parallel.sequence
    return (data if isinstance(data, int) else 1) * (sequence if isinstance(sequence, int) else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plan.py",
        description="Parameters, FLOPs, memory, step time and the longest sequence of a training run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="a configuration")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace its own")
    parser.add_argument("--gpus", type=_count, metavar="n", help="ranks (default parallel.data × parallel.sequence)")
    names = ", ".join(device.name for device in GPUS)
    parser.add_argument("--device", metavar="NAME", help=f"cpu or one of {names} (default: this machine's, else h100)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    return parser


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


if __name__ == "__main__":
    run_cli(main)
