"""Time of a decoded token at some positions of a text: it should not grow with the position.

    python benchmarks/decode.py [--powers 14 20] [--tokens 128] [--rounds 9]

The text before each position passes in chunks, then tokens are decoded one at a time. The positions take turns, so
that a drift of the machine hits all. Position ``2^p`` means the tokens just before row ``2^p``, where all segments that
are no longer than ``2^p`` are full: the dearest place.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment
from longnet_dist import DilatedPattern, LongNet, LongNetConfig
from longnet_dist.inference.decoder import Decoder


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Measure as the command line says."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    pattern = DilatedPattern.geometric(options.base, 2 ** max(options.powers), 4)
    config = LongNetConfig(
        dim=options.dim,
        layers=options.layers,
        heads=options.heads,
        segment_lengths=pattern.segment_lengths,
        dilation_rates=pattern.dilation_rates,
        positions="rope",
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LongNet(config).eval().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    num_tokens = options.tokens * (1 + options.rounds)
    decoders = {power: prefilled(model, 2**power, num_tokens) for power in tqdm(options.powers, unit="position")}
    for decoder in decoders.values():
        decode(decoder, options.tokens)
    seconds: dict[int, list[float]] = {power: [] for power in options.powers}
    for _ in tqdm(range(options.rounds), unit="round"):
        for power, decoder in decoders.items():
            start = time.perf_counter()
            decode(decoder, options.tokens)
            seconds[power].append((time.perf_counter() - start) / options.tokens)
    result = {
        "command": "python benchmarks/decode.py",
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "environment": environment(),
        "model": config.model_dump(mode="json"),
        "milliseconds_per_token": {power: [1e3 * second for second in seconds[power]] for power in seconds},
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    for power, values in seconds.items():
        print(f"position 2^{power}: {1e3 * statistics.median(values):.3f} ms a token (fastest {1e3 * min(values):.3f})")


def prefilled(model: LongNet, end: int, num_tokens: int) -> Decoder:
    """A text of ``end`` tokens, of which all but the last ``num_tokens`` have passed."""
    decoder = Decoder(model, 1, end + 1)
    decoder.load(torch.randint(256, (end - num_tokens,)).tolist(), [0])
    return decoder


def decode(decoder: Decoder, num_tokens: int) -> None:
    """Decode the next tokens; reading each waits for the device, as sampling would."""
    for _ in range(num_tokens):
        ids = decoder.step().argmax(-1)
        decoder.follow(ids)
        int(ids)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--powers", type=int, nargs="+", default=[14, 17, 20], help="positions 2^p")
    add("--tokens", type=int, default=128, help="decoded in a round")
    add("--rounds", type=int, default=9)
    add("--layers", type=int, default=2)
    add("--dim", type=int, default=64)
    add("--heads", type=int, default=4)
    add("--base", type=int, default=512, help="shortest segment")
    add("--threads", type=int, default=1)
    add("--output", type=Path, default=Path("benchmarks/results/decode.json"))
    return parser


if __name__ == "__main__":
    main()
