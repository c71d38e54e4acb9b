"""``longnet embed``: a vector for every sequence of features in a folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longnet_dist.cli.program.parser import CommandParser

if TYPE_CHECKING:
    import torch

SUMMARY = "embed a folder of features, such as tiles of slides, with an encoder"
EXAMPLES = """\
examples:
  longnet embed gigapath slides --output vectors.safetensors
  longnet embed gigapath slides --output layers.safetensors --all-layers --precision bf16

MODEL is what longnet convert wrote, such as: longnet convert gigapath slide_encoder.pth --output gigapath
It may also be the folder of a run on features (data.features), whose newest checkpoint is taken.

FOLDER has a file for each sequence: .h5 or .hdf5 with the datasets features and coords, .pt with a tensor or with these
two keys, or .npy with NAME.coords.npy beside it. The output is a safetensors file with a vector for each name. If it
exists, what it lacks is added.
"""


def main(arguments: Sequence[str]) -> None:
    """Embed as the command line says.

    Args:
        arguments: the words behind ``longnet embed``.

    Raises:
        LongNetError: no such model or folder, or files that cannot be embedded.
    """
    options = parser().parse_args(arguments)

    from longnet_dist.inference.features.embedding import embed_folder

    new, lines = embed_folder(
        options.model, options.folder, options.output, *device_and_dtype(options), options.all_layers
    )
    report(f"{new} new vectors in {options.output}", lines)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``longnet embed``."""
    result = CommandParser("embed", "Embed every sequence of features in a folder.", EXAMPLES)
    result.add_argument("model", type=Path, metavar="MODEL", help="folder that longnet convert wrote, or a run")
    add_folder(result, "safetensors; continued if it exists")
    result.add_argument("--all-layers", action="store_true", help="a vector of each layer: (layers + 1, dim)")
    return result


def add_folder(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the options of a command that reads a folder of features.

    Args:
        parser: of the command.
        output: what the output is.
    """
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with features: .h5, .hdf5, .npy, .pt")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=output)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default %(default)s)")
    parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1 (default: a GPU if there is one)")


def device_and_dtype(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Return where and how precisely to compute, by the options of :func:`add_folder`.

    Raises:
        ConfigError: this machine has no such device.
    """
    import torch

    from longnet_dist.errors import ConfigError
    from longnet_dist.numerics import dtype_of

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        known = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise ConfigError(f"--device={name} is no device of this machine; it has {', '.join(known)}") from None
    return device, dtype_of(options.precision)


def report(result: str, lines: Sequence[str]) -> None:
    """Print what was written to stdout, and what was left out and warnings, a line each, to stderr."""
    print(result)
    for line in lines:
        print(line, file=sys.stderr)
