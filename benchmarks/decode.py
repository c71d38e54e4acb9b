"""Time of a decoded token at some positions of a text: it should not grow with the position.

    python benchmarks/decode.py [--powers 14 20] [--tokens 128] [--rounds 9] [--graphs]
    python benchmarks/decode.py --bars --output benchmarks/results/decode_h200.json

The text before each position passes in chunks, then tokens are decoded one at a time. The positions take turns, so
that a drift of the machine hits all. Position ``2^p`` means the tokens just before row ``2^p``, where all segments that
are no longer than ``2^p`` are full: the dearest place.

``--bars`` measures a model of ``--layers 12 --dim 768 --heads 12`` with the paper's pattern, each with and without CUDA
graphs, with torch's attention and, on a GPU, with our kernels. Its caches are filled with noise, without a prompt:

* ``one``: one text at each position;
* ``streams``: ``--streams`` texts at random positions, tokens a second and the share of the memory's bandwidth that
  weights and visible caches take; ``grouped``: the same with ``kv_heads=4``;
* ``prefill``: a prompt of ``2^max(powers)`` tokens, beside the forward with loss of a training step of as many.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment, output_file
from longnet_dist import DilatedPattern, LongNet, LongNetConfig
from longnet_dist.engine.execution import Execution
from longnet_dist.inference.decoder import Decoder


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Measure as the command line says."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.bars:
        measure_bars(options)
        return
    pattern = DilatedPattern.geometric(options.base, 2 ** max(options.powers), 4)
    config = LongNetConfig(
        dim=options.dim,
        layers=options.layers,
        heads=options.heads,
        segment_lengths=pattern.segment_lengths,
        dilation_rates=pattern.dilation_rates,
        positions="rope",
    )
    model = built(config)
    num_tokens = options.tokens * (1 + options.rounds)
    decoders = {
        power: prefilled(model, 2**power, num_tokens, options.graphs) for power in tqdm(options.powers, unit="position")
    }
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


def measure_bars(options: argparse.Namespace) -> None:
    """Measure a large model on synthetic caches; every part is written when it is there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {"environment": environment(), "options": {k: str(v) for k, v in vars(options).items()}}
    longest, paper = 2 ** max(options.powers), DilatedPattern.paper()
    for name, kv_heads in (("one", None), ("streams", None), ("grouped", 4)):
        config = LongNetConfig(
            dim=options.dim,
            layers=options.layers,
            heads=options.heads,
            kv_heads=kv_heads,
            segment_lengths=paper.segment_lengths,
            dilation_rates=paper.dilation_rates,
        )
        model, result[name] = built(config), []
        generator = torch.Generator().manual_seed(0)
        places = [[2**power - options.tokens] for power in options.powers]
        if name != "one":
            places = [torch.randint(longest - options.tokens, (options.streams,), generator=generator).tolist()]
        split = (False, True) if device.type == "cuda" else (False,)
        for rows, graphs, split_keys in product(places, (False, True), split):
            point = measure_steps(filled(model, rows, longest + 1, graphs, split_keys), model, rows, options)
            result[name].append({"graphs": graphs, "split_keys": split_keys} | point)
            speed = f"{point['milliseconds_per_step']:.3f} ms a step, {point['tokens_per_second']:,.0f} tokens/s"
            how = f"graphs={graphs}, split_keys={split_keys}"
            print(f"{name}, {len(rows)} texts from row {rows[0]:,}, {how}: {speed}", flush=True)
        if name == "one":
            result["prefill"] = prefill(model, longest, device)
            print("prefill", result["prefill"], flush=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def measure_steps(decoder: Decoder, model: LongNet, rows: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Time steps that begin at ``rows``, again and again."""
    decode(decoder, 3)
    times = []
    for _ in range(options.rounds):
        decoder._cache.rows.copy_(torch.tensor(rows))
        start = time.perf_counter()
        decode(decoder, options.tokens)
        times.append((time.perf_counter() - start) / options.tokens)
    seconds, size = statistics.median(times), step_bytes(model, decoder)
    return {
        "rows": rows,
        "milliseconds_per_step": 1e3 * seconds,
        "all": [1e3 * each for each in times],
        "tokens_per_second": len(rows) / seconds,
        "bytes": size,
        "bytes_per_second": size / seconds,
    }


def built(config: LongNetConfig) -> LongNet:
    """Make the model in the precision of its device; on a GPU chunks of a prompt run compiled."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    execution = Execution("selective", compile=device.type == "cuda")
    model = LongNet(config, execution=execution).eval()
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def filled(model: LongNet, rows: list[int], max_rows: int, graphs: bool, split_keys: bool) -> Decoder:
    """A decoder whose texts are at ``rows``, with noise in all caches."""
    decoder = Decoder(model, len(rows), max_rows, graphs=graphs, split_keys=split_keys)
    cache = decoder._cache
    cache.rows.copy_(torch.tensor(rows))
    cache._going_on.fill_(1)
    for layer in cache.layers:
        layer.records.normal_()
    return decoder


def step_bytes(model: LongNet, decoder: Decoder) -> int:
    """Bytes that a step must read: the weights, and the keys and values that the texts see."""
    cache = decoder._cache
    seen = {layer.grid.pattern: int(cache.present(layer.grid).seen.sum()) for layer in cache.layers}
    record = 2 * cache.layers[0].records.shape[-1] * cache.layers[0].records.element_size()
    cache.forget_places()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return weights + sum(seen[layer.grid.pattern] * record for layer in cache.layers)


def prefill(model: LongNet, rows: int, device: torch.device) -> dict[str, float]:
    """Seconds of a prompt of ``rows`` tokens, and of a training step's forward of as many; the second of two runs."""
    tokens = torch.randint(256, (1, rows), device=device)
    decoder, found = Decoder(model, 1, rows + 1), {}

    def timed(name: str, function: Callable[[], Any]) -> None:
        for _ in range(2):
            result = function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            del result
            result = function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            found[name] = time.perf_counter() - start
            del result

    prompt = tokens[0].tolist()
    timed("prefill_seconds", lambda: decoder.load(prompt, [0]))
    model.train()
    with torch.enable_grad():
        timed("training_forward_seconds", lambda: model(tokens, tokens).loss)
    model.eval()
    return found | {"rows": rows}


def prefilled(model: LongNet, end: int, num_tokens: int, graphs: bool = False) -> Decoder:
    """A text of ``end`` tokens, of which all but the last ``num_tokens`` have passed."""
    decoder = Decoder(model, 1, end + 1, graphs=graphs)
    decoder.load(torch.randint(256, (end - num_tokens,)).tolist(), [0])
    return decoder


def decode(decoder: Decoder, num_tokens: int) -> None:
    """Decode the next tokens; reading each waits for the device, as sampling would."""
    for _ in range(num_tokens):
        ids = decoder.step().argmax(-1)
        decoder.follow(ids)
        ids.tolist()


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
    add("--graphs", action="store_true", help="replay steps as CUDA graphs")
    add("--bars", action="store_true", help="the paper's pattern on synthetic caches; see above")
    add("--streams", type=int, default=64, help="texts of --bars")
    add("--output", type=output_file, default=Path("benchmarks/results/decode.json"))
    return parser


if __name__ == "__main__":
    main()
