"""A worker process: ``python -m longnet_dist.data.encoding.worker`` encodes what comes on standard input.

It reads the tokenizer's JSON and the dtype, then batches, and answers each with an ``Encoded`` or an exception, all as
pickles. It ends with its input, so also when the process that started it is killed.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys

from longnet_dist.data.encoding.pieces import Encoder
from longnet_dist.data.tokenizers import tokenizer_from_json


def main() -> None:
    """Encode until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt in a terminal reaches all; the starter ends this one
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    requests = sys.stdin.buffer
    fields, dtype = pickle.load(requests)
    encode = Encoder(tokenizer_from_json(fields), dtype)
    while True:
        try:
            batch = pickle.load(requests)
        except EOFError:
            return
        try:
            answer: object = encode(batch)
        except Exception as error:
            answer = error
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, KeyboardInterrupt, EOFError):
        sys.exit(1)
