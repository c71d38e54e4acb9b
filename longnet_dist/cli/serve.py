"""``longnet serve``: completions of a trained model over HTTP."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from longnet_dist.cli.program.parser import CommandParser, positive

SUMMARY = "answer completion requests over HTTP"
EXAMPLES = """\
examples:
  longnet serve runs/quickstart
  longnet serve runs/quickstart --port 9000 --texts 64 --max-tokens 131072

  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"prompt": "def ", "max_tokens": 50, "stream": true}'

Any client of OpenAI's completions endpoint works, with http://HOST:PORT/v1 as its base address.
"""


def main(arguments: Sequence[str]) -> None:
    """Serve as the command line says, until it is interrupted.

    Args:
        arguments: the words behind ``longnet serve``.

    Raises:
        LongNetError: no such run, a model that cannot continue a text, or a port that is taken.
    """
    options = parser().parse_args(arguments)

    from longnet_dist.extras import require_extra

    require_extra("serve", "longnet serve")

    import torch

    from longnet_dist.data.tokenizers import ids_with_text
    from longnet_dist.inference.decoder import Decoder
    from longnet_dist.inference.runs import load_trained
    from longnet_dist.serving.app import application
    from longnet_dist.serving.batcher import Batcher
    from longnet_dist.serving.server import run

    model, tokenizer = load_trained(options.run)
    allowed = torch.from_numpy(ids_with_text(tokenizer, model.config.vocab_size))
    batcher = Batcher(Decoder(model, options.texts, options.max_tokens, allowed=allowed))
    run(application(batcher, tokenizer, options.name or options.run.resolve().name), options.host, options.port)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``longnet serve``."""
    result = CommandParser("serve", "Answer completion requests over HTTP, as OpenAI's endpoint does.", EXAMPLES)
    result.add_argument(
        "run", type=Path, metavar="RUN_DIR", help="folder of a run, a checkpoint, an exported model, or a Llama"
    )
    result.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    result.add_argument("--port", type=positive, default=8000, help="(default %(default)s)")
    result.add_argument("--texts", type=positive, default=16, metavar="n", help="decoded at once (default %(default)s)")
    longest = "tokens of a text with its prompt, at most (default %(default)s)"
    result.add_argument("--max-tokens", type=positive, default=32768, metavar="N", help=longest)
    result.add_argument("--name", help="of the model, for clients (default: that of the folder)")
    return result
