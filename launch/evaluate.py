"""Measure a trained model: launch/evaluate.py RUN_DIR --data TOKEN_FILE (--context N [N ...] | --stream)."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from longnet_dist.cli.exit_status import run_cli
from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.inference.evaluation import Evaluation
from longnet_dist.inference.runs import evaluate_run, evaluate_run_streamed

EXAMPLES = """\
examples:
  python launch/evaluate.py runs/quickstart --data book.tokens --context 512 2048
  torchrun --nproc_per_node=8 launch/evaluate.py runs/long --data book.tokens --context 1048576 --json
  python launch/evaluate.py runs/long --data library.tokens --stream --chunk 262144

With torchrun every sequence is split over all ranks, so that a context may be longer than one device can hold. All
contexts predict the same tokens, the first of the file's validation split. With --stream the whole file (or what
--split and --tokens leave of it) is one sequence, which passes in chunks: memory does not depend on its length. An
interrupted run goes on with --resume.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says; every rank runs this and rank 0 prints.

    Args:
        arguments: the command line without the program's name, by default that of the process.
    """
    options = _parser().parse_args(arguments)
    launch = LaunchEnvironment.read(os.environ)
    run, data, num_tokens = options.run, options.data, options.tokens
    if options.stream:
        split, state, resume = options.split or "all", options.state, options.resume
        result = evaluate_run_streamed(run, data, options.chunk, num_tokens, split, launch, state, resume)
        results = {result.tokens: result}
    else:
        num_tokens = 262144 if num_tokens is None else num_tokens
        results = evaluate_run(run, data, options.context, num_tokens, options.split or "validation", launch)
    if launch.rank == 0:
        print(json.dumps({n: asdict(result) for n, result in results.items()}) if options.json else _table(results))


def _table(results: dict[int, Evaluation]) -> str:
    lines = [f"{'context':>10} {'loss':>9} {'perplexity':>11} {'bits/byte':>10} {'tokens':>12}"]
    for context, result in results.items():
        lines.append(
            f"{context:>10} {result.loss:>9.4f} {result.perplexity:>11.3f} {result.bits_per_byte:>10.4f} "
            f"{result.tokens:>12,}"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Loss (nats a token), perplexity and bits per byte of a trained model at some context lengths.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run, or one of its checkpoints")
    parser.add_argument("--data", type=Path, required=True, metavar="TOKEN_FILE", help="made by prepare_data.py")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--context", type=int, nargs="+", metavar="N", help="context lengths, tokens")
    how.add_argument("--stream", action="store_true", help="the whole text is one sequence, of any length")
    parser.add_argument(
        "--chunk", type=int, default=65536, metavar="C", help="rows of it at once (default %(default)s)"
    )
    parser.add_argument("--state", type=Path, metavar="FILE", help="keeps the stream's state (default in RUN_DIR)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted stream")
    parser.add_argument("--tokens", type=int, metavar="T", help="tokens to predict (default 262144; --stream: all)")
    parser.add_argument(
        "--split", choices=("validation", "train", "all"), help="of the token file (default validation; --stream: all)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object with one entry for each context")
    return parser


if __name__ == "__main__":
    run_cli(main)
