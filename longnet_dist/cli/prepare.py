"""``longnet prepare``: text into a token file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from longnet_dist.cli.program.parser import CommandParser, positive

SUMMARY = "turn text files and archives into a token file to train on"
EXAMPLES = """\
examples:
  longnet prepare enwik8.zip --output enwik8.tokens
  longnet prepare docs/ 'books/**/*.txt' dump.tar.xz --output corpus.tokens --validation 0.01
  longnet prepare wiki.txt.gz --output wiki.tokens --tokenizer path/to/tokenizer.json
  longnet prepare wiki.txt.gz --output wiki.tokens --tokenizer tiktoken:gpt2
  longnet prepare wiki.jsonl.zst web/*.parquet --output web.tokens --train-tokenizer 32768 --shuffle 0
  longnet prepare genome.fa.gz --output genome.tokens
  zcat dump.gz | longnet prepare - --output dump.tokens
  longnet prepare --standard-library --output python.tokens

Inputs are read as a stream, so they may be larger than the memory. A text file is one document, and so are a line
of JSON lines (.jsonl), a row of Parquet (.parquet) and a record of FASTA (.fa .fasta .fna .faa). Binary files (a zero
byte in the first 8 KiB) and, in folders and archives, hidden files are skipped and counted.
"""


def main(arguments: Sequence[str]) -> None:
    """Prepare a token file as the command line says.

    Args:
        arguments: the words behind ``longnet prepare``.

    Raises:
        DataError: an input that cannot be read, or an output that exists or cannot be written.
        MissingExtraError: a package that an input or the tokenizer needs is not installed.
    """
    options = parser().parse_args(arguments)

    from longnet_dist.data.corpus import find_corpus, standard_library
    from longnet_dist.data.encoding.training import train_tokenizer
    from longnet_dist.data.prepare import prepare
    from longnet_dist.data.token_file import TokenFile
    from longnet_dist.data.token_file_writer import refuse_existing
    from longnet_dist.data.tokenizers import Tokenizer, load_tokenizer
    from longnet_dist.errors import DataError
    from longnet_dist.machine import usable_cores
    from longnet_dist.resilience.stop_signals import clean_ends

    if options.standard_library == bool(options.inputs):
        raise DataError("give either INPUT files, folders, globs and archives, or --standard-library")
    if options.tokenizer and options.train_tokenizer is not None:
        raise DataError("give either --tokenizer, or --train-tokenizer to make one from the text")
    if options.standard_library:
        corpus = standard_library()
    else:
        corpus = find_corpus(options.inputs, format=options.format, text_column=options.text_column)
    if options.train_tokenizer is not None:
        refuse_existing(Path(options.output), options.overwrite)  # training takes a while
        tokenizer: Tokenizer = train_tokenizer(corpus, options.train_tokenizer)
    else:
        tokenizer = load_tokenizer(options.tokenizer or "bytes")
    with clean_ends():
        prepared = prepare(
            corpus,
            options.output,
            tokenizer,
            validation=options.validation,
            overwrite=options.overwrite,
            num_workers=options.workers or usable_cores(),
            shuffle=options.shuffle,
        )
    if options.verify:
        TokenFile.open(prepared.path, verify=True)
    print(prepared.summary())


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``longnet prepare``."""
    what = "Turn text files, folders, globs and archives (.zip .gz .xz .bz2 .zst .tar .tar.*) into a token file."
    result = CommandParser("prepare", what, EXAMPLES)
    result.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="file, folder, quoted glob, archive, or - for standard input"
    )
    result.add_argument("--standard-library", action="store_true", help="the source text of Python's standard library")
    result.add_argument("--output", required=True, metavar="FILE", help="token file to write")
    result.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="bytes (default), the path of a Hugging Face tokenizer.json, or tiktoken:ENCODING",
    )
    result.add_argument(
        "--train-tokenizer", type=int, metavar="SIZE", help="first train a byte-level BPE of SIZE tokens on the text"
    )
    result.add_argument(
        "--workers", type=positive, metavar="N", help="processes that tokenize (default: one for each core)"
    )
    result.add_argument(
        "--format",
        choices=("text", "jsonl", "parquet", "fasta"),
        help="how to read all inputs (default: by their names)",
    )
    result.add_argument(
        "--text-column",
        default="text",
        metavar="NAME",
        help="key of a JSON line, or column of a Parquet file, that is the text (default %(default)s)",
    )
    result.add_argument(
        "--validation",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of the tokens, at the end, held out for validation (default %(default)s)",
    )
    result.add_argument(
        "--shuffle", type=int, metavar="SEED", help="shuffle the documents, so that validation is a sample of them all"
    )
    result.add_argument("--verify", action="store_true", help="read FILE back and compare its checksums")
    result.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    return result
