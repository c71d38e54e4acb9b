"""CPU time to plan a batch of packed documents, on one core of the host: milliseconds.

    python benchmarks/document_plans.py [--output benchmarks/results/document_plans.json]

The lengths are log-normal (mean 1,260, sigma 1.2), new in each batch. The pattern is geometric from 2,048 up to all
rows, 12 heads of 64, causal, with overlaps merged as on a GPU. A plan reads and checks the edges, makes the tables of
segments of all launches, and over ranks the exchange of one rank. Later layers find it again by the edges. ``tiles`` is
the time to list the tiles of all backward launches on a Hopper GPU, which a plan that is made ahead does, too.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment, output_file
from longnet_dist.attention.functional import AttentionSpec
from longnet_dist.attention.kernels.contract import Call
from longnet_dist.attention.kernels.hopper.tables import listed_tiles
from longnet_dist.attention.kernels.registry import choose_kernel
from longnet_dist.attention.packing import PackedBatch
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import Shards

HEADS, DIM, BASE, MEAN, SIGMA = 12, 64, 2048, 1260, 1.2
CPU = torch.device("cpu")


def random_edges(generator: np.random.Generator, documents: int) -> list[int]:
    """Edges of as many documents, one behind the other."""
    lengths = generator.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, documents)
    return [0, *np.cumsum(np.maximum(lengths.astype(np.int64), 1)).tolist()]


def plan(edges: list[int], ranks: int) -> list[Call]:
    """Do what a layer does on the host before its first launch, on the middle one of ``ranks`` ranks.

    Returns:
        all calls of the kernel.
    """
    rows, rank = edges[-1], ranks // 2
    x = torch.empty(1).expand(1, rows, HEADS, DIM)
    packed = PackedBatch.read(edges, x, x, None, None)
    (item,) = packed.items(x, x, x, None)
    pattern, kernel = DilatedPattern.geometric(BASE, rows), choose_kernel("auto", CPU, torch.float32)
    shards = Shards.even(rows, ranks)
    spec = AttentionSpec(
        pattern, shards, rank, True, 0.125, kernel, True, None, False, True, None, item.documents
    )  # fmt: skip
    if ranks > 1:
        packed.digest  # noqa: B018 (the ranks compare it)
    calls = list(spec.dense_calls(HEADS))
    if spec.exchanges:
        spec.plan(HEADS)
        calls += [call for of_segment in spec.shared_calls(HEADS) for call in of_segment]
    return calls


def measured(documents: int, ranks: int, batches: int) -> dict[str, Any]:
    """Median and largest milliseconds of the first layer, the median of a later one, and that of the tiles."""
    generator = np.random.default_rng(0)
    first, later, tiles = list[float](), list[float](), list[float]()
    for number in range(batches + 3):
        edges = random_edges(generator, documents)
        times = [time.process_time()]
        for given in (edges, list(edges)):
            calls = plan(given, ranks)
            times.append(time.process_time())
        for call in calls:
            if call.piece.table is not None:
                listed_tiles(call.piece, False, 128, call.fresh)
        times.append(time.process_time())
        if number >= 3:  # the first ones import
            for found, start, stop in zip((first, later, tiles), times, times[1:], strict=False):
                found.append(1000 * (stop - start))
    return {
        "documents": documents,
        "ranks": ranks,
        "first_layer_ms": statistics.median(first),
        "first_layer_worst_ms": max(first),
        "later_layer_ms": statistics.median(later),
        "tiles_ms": statistics.median(tiles),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--output", type=output_file, default=Path("benchmarks/results/document_plans.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    points = [measured(number, ranks, options.batches) for number in options.documents for ranks in options.ranks]
    for point in points:
        print(" ".join(f"{name}={value:.3g}" for name, value in point.items()))
    command = shlex.join(["python", *sys.argv])
    options.output.write_text(
        json.dumps({"command": command, "environment": environment(), "points": points}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
