"""``longnet prepare``: text into a token file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from longnet_dist.cli.program.parser import CommandParser

SUMMARY = "turn text files and archives into a token file to train on"
EXAMPLES = """\
examples:
  longnet prepare enwik8.zip --output enwik8.tokens
  longnet prepare docs/ 'books/**/*.txt' dump.tar.xz --output corpus.tokens --validation 0.01
  longnet prepare wiki.txt.gz --output wiki.tokens --tokenizer path/to/tokenizer.json
  longnet prepare wiki.txt.gz --output wiki.tokens --tokenizer tiktoken:gpt2
  longnet prepare --standard-library --output python.tokens

Inputs are read as a stream, so they may be larger than the memory. Binary files (a zero byte in the first
8 KiB) and, in folders and archives, hidden files are skipped and counted.
"""


def main(arguments: Sequence[str]) -> None:
    """Prepare a token file as the command line says.

    Args:
        arguments: the words behind ``longnet prepare``.

    Raises:
        DataError: an input that cannot be read, or an output that exists or cannot be written.
    """
    options = parser().parse_args(arguments)

    from longnet_dist.data.corpus import find_corpus, standard_library
    from longnet_dist.data.prepare import prepare
    from longnet_dist.data.tokenizers import load_tokenizer
    from longnet_dist.errors import DataError

    if options.standard_library == bool(options.inputs):
        raise DataError("give either INPUT files, folders, globs and archives, or --standard-library")
    corpus = standard_library() if options.standard_library else find_corpus(options.inputs)
    prepared = prepare(
        corpus,
        options.output,
        load_tokenizer(options.tokenizer),
        validation=options.validation,
        overwrite=options.overwrite,
    )
    print(prepared.summary())


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``longnet prepare``."""
    what = "Turn text files, folders, globs and archives (.zip .gz .xz .bz2 .tar .tar.*) into a token file."
    result = CommandParser("prepare", what, EXAMPLES)
    result.add_argument("inputs", nargs="*", metavar="INPUT", help="file, folder, quoted glob or archive")
    result.add_argument("--standard-library", action="store_true", help="the source text of Python's standard library")
    result.add_argument("--output", required=True, metavar="FILE", help="token file to write")
    result.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="NAME",
        help="bytes (default), the path of a Hugging Face tokenizer.json, or tiktoken:ENCODING",
    )
    result.add_argument(
        "--validation",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of the tokens, at the end, held out for validation (default %(default)s)",
    )
    result.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    return result
