"""``longnet generate``: text that a trained model adds to a prompt."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from longnet_dist.cli.program.parser import CommandParser, natural, positive

SUMMARY = "let a trained model continue a text"
SEPARATOR = "-" * 40  # between samples
EXAMPLES = """\
examples:
  longnet generate runs/quickstart --prompt "def "
  longnet generate runs/quickstart --prompt-file story.txt --tokens 500 --samples 3 --seed 7
  longnet generate runs/quickstart --prompt "import " --temperature 0
  git diff | longnet generate runs/quickstart --prompt-file -
  longnet generate runs/quickstart --prompt "def f(" --top-p 0.9 --stop "def "
"""


def main(arguments: Sequence[str]) -> None:
    """Generate as the command line says.

    Args:
        arguments: the words behind ``longnet generate``.

    Raises:
        LongNetError: no such run or prompt file, or a model that cannot continue a text.
    """
    options = parser().parse_args(arguments)

    from longnet_dist.inference.generation import Sampling
    from longnet_dist.inference.runs import continue_text

    sampling = Sampling(options.temperature, options.top_k, options.seed, options.top_p)
    # A word of the command line that is not UTF-8 has the bytes that were typed.
    prompt = os.fsencode(options.prompt) if options.prompt_file is None else _read(options.prompt_file)
    show = _write if options.samples == 1 else None
    texts = continue_text(options.run, prompt, options.tokens, sampling, options.samples, options.stop, show)
    print("" if show else f"\n{SEPARATOR}\n".join(texts))


def _write(text: str) -> None:
    """Write a piece of text at once."""
    print(text, end="", flush=True)


def _read(path: Path) -> bytes:
    from longnet_dist.errors import DataError

    if str(path) == "-" and sys.stdin is None:
        raise DataError("standard input is closed; give the prompt there, or name a file: --prompt-file FILE")
    try:
        return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the prompt file {path}: {error.strerror}") from None


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``longnet generate``."""
    result = CommandParser("generate", "Let a trained model continue a text.", EXAMPLES)
    result.add_argument(
        "run", type=Path, metavar="RUN_DIR", help="folder of a run, a checkpoint, an exported model, or a Llama"
    )
    prompt = result.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with that text; -: standard input")
    result.add_argument("--tokens", type=natural, default=200, metavar="N", help="tokens to add (default %(default)s)")
    result.add_argument("--samples", type=positive, default=1, metavar="n", help="texts to write (default %(default)s)")
    result.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (default %(default)s)")
    result.add_argument("--top-k", type=int, default=40, help="of the likeliest tokens; 0: all (default %(default)s)")
    result.add_argument("--top-p", type=float, default=1.0, help="likeliest tokens of this probability (default all)")
    result.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    result.add_argument("--seed", type=int, default=0, help="of the draws (default %(default)s)")
    return result
