"""Write a trained model into a folder of its own: launch/export.py RUN_DIR OUTPUT_DIR [--precision bf16]."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from longnet_dist.cli.exit_status import run_cli
from longnet_dist.inference.runs import export_run

EXAMPLES = """\
examples:
  python launch/export.py runs/quickstart exported
  python launch/export.py runs/paper/checkpoints/step_00250000 exported --precision bf16

OUTPUT_DIR gets model.safetensors, config.json and tokenizer.json. To use it:

  from longnet_dist.model.pretrained import from_pretrained
  model = from_pretrained("exported")
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Export as the command line says.

    Args:
        arguments: the command line without the program's name, by default that of the process.
    """
    options = _parser().parse_args(arguments)
    export_run(options.run, options.output, options.precision)
    print(f"exported to {options.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="export.py",
        description="Write a trained model into a folder of its own: weights, configuration and tokenizer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run, or one of its checkpoints")
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR", help="new, or empty")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the weights (default %(default)s)"
    )
    return parser


if __name__ == "__main__":
    run_cli(main)
