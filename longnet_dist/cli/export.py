"""``longnet export``: a trained model in a folder of its own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from longnet_dist.cli.program.parser import CommandParser

SUMMARY = "write a trained model into a folder of its own: weights, configuration, tokenizer"
EXAMPLES = """\
examples:
  longnet export runs/quickstart exported
  longnet export runs/paper/checkpoints/step_00250000 exported --precision bf16
  longnet export runs/quickstart exported --to hf
  longnet export runs/llama --to hf --output dilated-llama

OUTPUT_DIR gets model.safetensors, config.json and tokenizer.json. Of a run on features it gets the encoder,
head.safetensors and classes.json. To use it:

  from longnet_dist.model.pretrained import from_pretrained
  model = from_pretrained("exported")

With --to hf, transformers loads it too:

  import longnet_dist.hf
  model = AutoModelForCausalLM.from_pretrained("exported")

A run with model.path has --to hf alone: the folder is that of its model, with the trained weights and the pattern.
"""


def main(arguments: Sequence[str]) -> None:
    """Export as the command line says.

    Args:
        arguments: the words behind ``longnet export``.

    Raises:
        LongNetError: no such run, or the output cannot be written.
    """
    options = parser().parse_args(arguments)

    from longnet_dist.errors import ConfigError
    from longnet_dist.inference.features.feature_runs import export_feature_run, is_feature_run
    from longnet_dist.inference.runs import export_run
    from longnet_dist.model.pretrained import check_new

    if (options.place is None) == (options.output is None):
        raise ConfigError("give one output folder: longnet export RUN_DIR OUTPUT_DIR, or --output OUTPUT_DIR")
    output = options.output or options.place
    check_new(output)
    if is_feature_run(options.run):
        if options.to == "hf":
            raise ConfigError(
                f"{options.run} is a run on features, for which transformers has no model; leave --to out"
            )
        export_feature_run(options.run, output, options.precision or "fp32")
        print(f"exported to {output}")
        return
    note = export_run(options.run, output, options.precision, options.to == "hf")
    print(f"exported to {output}" + (f"\n{note}" if note else ""))


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``longnet export``."""
    what = "Write a trained model into a folder of its own: weights, configuration and tokenizer."
    result = CommandParser("export", what, EXAMPLES)
    result.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run, or one of its checkpoints")
    result.add_argument("place", nargs="?", type=Path, metavar="OUTPUT_DIR", help="new, or empty")
    result.add_argument("--output", type=Path, metavar="OUTPUT_DIR", help="the same")
    what = "of the weights (default fp32; of a model of model.path, that of its config.json)"
    result.add_argument("--precision", choices=("fp32", "bf16"), help=what)
    result.add_argument(
        "--to", choices=("longnet", "hf"), default="longnet", help="hf: for transformers too (default %(default)s)"
    )
    return result
