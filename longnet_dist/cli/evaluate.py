"""``longnet evaluate``: the loss of a trained model at some context lengths, or on one long stream."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from longnet_dist.cli.program.parser import CommandParser, positive
from longnet_dist.cli.program.processes import Processes

if TYPE_CHECKING:
    from longnet_dist.comm.launch_env import LaunchEnvironment
    from longnet_dist.data.token_file import SplitName
    from longnet_dist.inference.evaluation import Evaluation

SUMMARY = "measure a trained model: loss, perplexity, bits per byte at any context length"
EXAMPLES = """\
examples:
  longnet evaluate runs/quickstart --data book.tokens --context 512 2048
  longnet evaluate runs/long --data book.tokens --context 1048576 --processes 8 --json
  longnet evaluate runs/long --data library.tokens --stream --chunk 262144
  longnet evaluate runs/slides                                   a run on features: its validation files
  longnet evaluate runs/slides --data others --labels others.csv
  longnet evaluate exported --data others --labels others.csv    a classifier that longnet export wrote

With several processes, or under a launcher (torchrun --nproc_per_node=8 -m longnet_dist evaluate ...), every sequence
is split over all ranks, so that a context may be longer than one device can hold. All contexts predict the same tokens,
the first of the file's validation split. With --stream the whole file (or what --split and --tokens leave of it) is one
sequence, which passes in chunks: memory does not depend on its length. An interrupted run goes on with --resume.
"""


def main(arguments: Sequence[str]) -> None:
    """Evaluate as the command line says; rank 0 prints.

    Args:
        arguments: the words behind ``longnet evaluate``.

    Raises:
        LongNetError: no such run or token file, or lengths that cannot be.
    """
    options = parser().parse_args(arguments)

    from longnet_dist.cli.program.ranks import run_on_ranks

    processes = Processes(["evaluate", *arguments], options.processes, each_gpu=False)
    run_on_ranks(processes, lambda launch: _evaluate(options, launch))


def _evaluate(options: argparse.Namespace, launch: LaunchEnvironment) -> None:
    """Evaluate on this rank."""
    from longnet_dist.data.token_file import TokenFile
    from longnet_dist.inference.features.feature_runs import is_exported_encoder, is_feature_run
    from longnet_dist.inference.runs import evaluate_run, evaluate_run_streamed
    from longnet_dist.telemetry.json_lines import json_text

    if is_exported_encoder(options.run) or is_feature_run(options.run):
        _evaluate_features(options, launch)
        return
    _check_text(options)
    if options.verify and launch.local_rank == 0:
        TokenFile.open(options.data, verify=True)
    run, data, num_tokens = options.run, options.data, options.tokens
    if options.stream:
        split: SplitName = options.split or "all"
        state, resume = options.state, options.resume
        result = evaluate_run_streamed(run, data, options.chunk, num_tokens, split, launch, state, resume)
        results = {result.tokens: result}
    else:
        num_tokens = 262144 if num_tokens is None else num_tokens
        results = evaluate_run(run, data, options.context, num_tokens, options.split or "validation", launch)
    if launch.rank == 0:
        print(json_text({n: asdict(result) for n, result in results.items()}) if options.json else _table(results))


def _check_text(options: argparse.Namespace) -> None:
    """Refuse options that do not say what text is evaluated, and how."""
    from longnet_dist.errors import ConfigError
    from longnet_dist.inference.model_folder import ModelFolder

    ModelFolder.is_at(options.run)  # which refuses a path where nothing is
    missing = ["--data TOKEN_FILE"] if options.data is None else []
    if options.context is None and not options.stream:
        missing.append("--context N or --stream")
    if missing:
        raise ConfigError(f"a language model is evaluated on a token file: give {', and '.join(missing)}")
    if options.labels is not None:
        raise ConfigError("--labels are for runs on features, but this is a language model; leave them out")


def _evaluate_features(options: argparse.Namespace, launch: LaunchEnvironment) -> None:
    """Evaluate a run on features on this rank."""
    from longnet_dist.errors import ConfigError
    from longnet_dist.inference.features.feature_runs import evaluate_feature_run
    from longnet_dist.telemetry.json_lines import json_text

    given = [name for name in ("context", "stream", "tokens", "state", "resume", "verify") if getattr(options, name)]
    if given:
        raise ConfigError(f"--{given[0]} is for language models, but {options.run} is a run on features; leave it out")
    tell = partial(print, file=sys.stderr)
    result = evaluate_feature_run(options.run, options.data, options.labels, options.split, launch, tell)
    if launch.rank == 0:
        lines = (f"{name:>9} {value:>9,.{0 if name == 'sequences' else 4}f}" for name, value in result.items())
        print(json_text(result) if options.json else "\n".join(lines))


def _table(results: dict[int, Evaluation]) -> str:
    lines = [f"{'context':>10} {'loss':>9} {'perplexity':>11} {'bits/byte':>10} {'tokens':>12}"]
    for context, result in results.items():
        lines.append(
            f"{context:>10} {result.loss:>9.4f} {result.perplexity:>11.3f} {result.bits_per_byte:>10.4f} "
            f"{result.tokens:>12,}"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``longnet evaluate``."""
    what = "Loss (nats a token), perplexity and bits per byte of a trained model at some context lengths."
    result = CommandParser("evaluate", what, EXAMPLES)
    result.add_argument(
        "run", type=Path, metavar="RUN_DIR", help="folder of a run, a checkpoint, an export, or a Llama"
    )
    data = "made by longnet prepare; of a run on features a folder (default: the run's)"
    result.add_argument("--data", type=Path, metavar="TOKEN_FILE", help=data)
    result.add_argument("--labels", type=Path, metavar="FILE", help="classes of features, CSV or JSON lines")
    how = result.add_mutually_exclusive_group()
    how.add_argument("--context", type=int, nargs="+", metavar="N", help="context lengths, tokens")
    how.add_argument("--stream", action="store_true", help="the whole text is one sequence, of any length")
    result.add_argument(
        "--chunk", type=int, default=65536, metavar="C", help="rows of it at once (default %(default)s)"
    )
    result.add_argument("--state", type=Path, metavar="FILE", help="keeps the stream's state (default in RUN_DIR)")
    result.add_argument("--resume", action="store_true", help="go on with an interrupted stream")
    result.add_argument("--tokens", type=int, metavar="T", help="tokens to predict (default 262144; --stream: all)")
    result.add_argument(
        "--split", choices=("validation", "train", "all"), help="of the token file (default validation; --stream: all)"
    )
    result.add_argument("--processes", type=positive, metavar="n", help="processes to start (default 1)")
    result.add_argument(
        "--verify", action="store_true", help="read the whole token file first and compare its checksums"
    )
    result.add_argument("--json", action="store_true", help="print a JSON object with one entry for each context")
    return result
