"""Time of the row-wise parts of a block, compiled, with kernels of our own and with torch's.

    python benchmarks/row_parts.py [--sizes 768:12:65536 2048:32:32768] [--output benchmarks/results/row_parts.json]

A size is ``model dim : heads : rows``, the rows of a tile. ``projections`` and ``output`` are a forward; ``output
gradients`` and ``projection gradients`` are a backward of checkpointed blocks, with what it computes again. On a GPU
with Triton; elsewhere both are torch's, which shows that the benchmark runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import clocks, environment, output_file
from longnet_dist import DilatedPattern, LongNetConfig
from longnet_dist.attention.positions import Positions
from longnet_dist.checkpoint.run_folder import write_text
from longnet_dist.cli.program.exit_status import run_cli
from longnet_dist.engine.rows import RowParts
from longnet_dist.model.block import Block
from longnet_dist.ops.gelu_norm.choice import PLAIN, GeluNorm
from longnet_dist.ops.join_gradients.reference import join_gradients
from longnet_dist.ops.matmul.choice import choose_matmul
from longnet_dist.ops.norm_gradients.reference import norm_gradients


class WithTorch(RowParts):
    """The same parts without kernels of our own, and with torch's matmuls."""

    middle, join_gradients, norm_gradients = PLAIN, staticmethod(join_gradients), staticmethod(norm_gradients)


def main(arguments: list[str] | None = None) -> None:
    """Measure as the command line says."""
    options = _parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results = []
    for size in options.sizes:
        dim, heads, rows = map(int, size.split(":"))
        with clocks() as gpu:
            milliseconds = dict(measure(dim, heads, rows, device, dtype, options.repeats))
        results.append({"dim": dim, "heads": heads, "rows": rows, "ms": milliseconds, "gpu": gpu})
        print(f"{dim:>5} × {rows:,} rows: {json.dumps(milliseconds)}", flush=True)
        write_text(options.output, json.dumps({"environment": environment(), "sizes": results}, indent=1) + "\n")


def measure(
    dim: int, heads: int, rows: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """``(part, {"kernels": ms, "torch": ms})`` of a block of the model, medians; the two take turns."""
    torch.manual_seed(0)
    config = LongNetConfig(dim=dim, layers=1, heads=heads, segment_lengths=[2048], dilation_rates=[1])
    with device:
        block = Block(config, None, None).to(dtype)
    head_dim = dim // heads
    table = Positions().table(DilatedPattern([2048], [1]), 0, rows, rows, head_dim, dtype, device)
    x, dz, dx = (torch.randn(rows, dim, device=device, dtype=dtype) for _ in range(3))
    out, dk, dv = (torch.randn(rows, heads, head_dim, device=device, dtype=dtype) for _ in range(3))
    dq = torch.randn(rows, heads, head_dim, device=device)
    weights = dict(block.named_parameters())
    matmul = choose_matmul("auto", device, dtype, rows, (dim, 4 * dim))
    kernels = RowParts(weights, table, head_dim, 1e-5, compile=True, matmul=matmul)
    plain = WithTorch(weights, table, head_dim, 1e-5, compile=True)
    moments = [part.output(x, out)[1] for part in (plain, kernels)]
    parts: dict[str, Callable[[RowParts], Any]] = {
        "projections": lambda part: part.projections(x),
        "output": lambda part: part.output(x, out),
        "output gradients": lambda part: part.output_gradients(x, out, dz, moments[part is kernels]),
        "projection gradients": lambda part: part.add_projection_gradients(x, (dq, dk, dv), dx),
    }
    for name, part in parts.items():
        times: dict[str, list[float]] = {"kernels": [], "torch": []}
        for repeat in range(repeats + 2):
            for kind, of in (("kernels", kernels), ("torch", plain)):
                seconds = _seconds(partial(part, of), device)
                if repeat >= 2:  # the first ones compile
                    times[kind].append(seconds)
        yield name, {kind: round(1e3 * statistics.median(each), 3) for kind, each in times.items()}
    inner, dy = (torch.randn(rows, 4 * dim, device=device, dtype=dtype) for _ in range(2))
    weight, bias = (torch.randn(4 * dim, device=device, dtype=dtype) for _ in range(2))
    functions = {"kernels": GeluNorm.of(device, dtype, 4 * dim), "torch": PLAIN}
    for name, given in (("forward", (inner, weight, bias, 1e-5)), ("gradients", (dy, inner, 1e-5))):
        result = {}
        for kind, pair in functions.items():
            run = partial(torch.compile(getattr(pair, name), dynamic=False), *given)
            result[kind] = round(1e3 * statistics.median([_seconds(run, device) for _ in range(repeats + 2)][2:]), 3)
        yield f"gelu norm, {name}", result


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["768:12:65536", "2048:32:32768"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=output_file, default=Path("benchmarks/results/row_parts.json"))
    return parser


if __name__ == "__main__":
    run_cli(main)
