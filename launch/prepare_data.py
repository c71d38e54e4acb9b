"""Turn text into a token file: python launch/prepare_data.py INPUT... --output FILE."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from longnet_dist.cli.exit_status import run_cli
from longnet_dist.data.corpus import find_corpus, standard_library
from longnet_dist.data.prepare import prepare
from longnet_dist.data.tokenizers import load_tokenizer
from longnet_dist.errors import DataError

EXAMPLES = """\
examples:
  python launch/prepare_data.py enwik8.zip --output enwik8.tokens
  python launch/prepare_data.py docs/ 'books/**/*.txt' dump.tar.xz --output corpus.tokens --validation 0.01
  python launch/prepare_data.py wiki.txt.gz --output wiki.tokens --tokenizer path/to/tokenizer.json
  python launch/prepare_data.py wiki.txt.gz --output wiki.tokens --tokenizer tiktoken:gpt2
  python launch/prepare_data.py --standard-library --output python.tokens

Inputs are read as a stream, so they may be larger than the memory. Binary files (a zero byte in the first
8 KiB) and, in folders and archives, hidden files are skipped and counted.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare a token file as the command line says.

    Args:
        arguments: the command line without the program's name, by default that of the process.
    """
    options = _parser().parse_args(arguments)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare_data.py",
        description="Turn text files, folders, globs and archives (.zip .gz .xz .bz2 .tar .tar.*) into a token file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="file, folder, quoted glob or archive")
    parser.add_argument("--standard-library", action="store_true", help="the source text of Python's standard library")
    parser.add_argument("--output", required=True, metavar="FILE", help="token file to write")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="NAME",
        help="bytes (default), the path of a Hugging Face tokenizer.json, or tiktoken:ENCODING",
    )
    parser.add_argument(
        "--validation",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of the tokens, at the end, held out for validation (default %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    return parser


if __name__ == "__main__":
    run_cli(main)
