"""Let a trained model continue a text: launch/generate.py RUN_DIR (--prompt TEXT | --prompt-file FILE)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from longnet_dist.cli.exit_status import run_cli
from longnet_dist.errors import DataError
from longnet_dist.inference.generation import Sampling
from longnet_dist.inference.runs import continue_text

SEPARATOR = "-" * 40  # between samples


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate as the command line says.

    Args:
        arguments: the command line without the program's name, by default that of the process.
    """
    options = _parser().parse_args(arguments)
    sampling = Sampling(options.temperature, options.top_k, options.seed)
    prompt = options.prompt if options.prompt_file is None else _read(options.prompt_file)
    texts = continue_text(options.run, prompt, options.tokens, sampling, options.samples)
    print(f"\n{SEPARATOR}\n".join(texts))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"cannot read the prompt file {path}: {error.strerror}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="generate.py", description="Let a trained model continue a text.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run, or one of its checkpoints")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with that text, of any length")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="tokens to add (default %(default)s)")
    parser.add_argument("--samples", type=int, default=1, metavar="n", help="texts to write (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=40, help="of the likeliest tokens; 0: all (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default %(default)s)")
    return parser


if __name__ == "__main__":
    run_cli(main)
