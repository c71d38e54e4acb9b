"""Time of packed documents and of padded sequences, beside one undivided sequence of as many rows.

    python benchmarks/documents.py [--rows 1048576] [--dims 64 128] [--output benchmarks/results/documents.json]

bfloat16, causal, 12 heads of 64 and 6 of 128, a geometric pattern from 2,048 to 32,768. ``lognormal`` are documents of
log-normal length (mean 1,260, sigma 1.2), ``long`` the same of mean 20,000. ``padded`` is a batch of 16 sequences of
1/64 to 1/1 of its rows, ``one by one`` the same sequences in calls of their own. ``ratio`` is the time a row over that
of the undivided sequence; for ``padded`` the time over that of ``one by one``. On a CPU, in float32 and with few rows,
it shows only that the benchmark runs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import clocks, environment, output_file
from longnet_dist.attention.functional import dilated_attention
from longnet_dist.attention.kernels.registry import describe_kernels
from longnet_dist.checkpoint.run_folder import write_text
from longnet_dist.geometry.pattern import DilatedPattern

MILLION, WIDTH, SIGMA, SEQUENCES = 1 << 20, 768, 1.2, 16
MEANS = {"lognormal": 1260, "long": 20_000}
Run = Callable[[], Any]


def document_edges(rows: int, mean: float, seed: int = 0) -> list[int]:
    """Edges of documents of log-normal length that fill ``rows`` rows; the last one is cut."""
    generator = np.random.default_rng(seed)
    edges = [0]
    while edges[-1] < rows:
        length = generator.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA)
        edges.append(min(rows, edges[-1] + max(1, int(length))))
    return edges


def sequence_lengths(longest: int) -> list[int]:
    """Lengths of a padded batch, from 1/64 of the longest up to it, in equal ratios."""
    return [max(1, round(longest / 64 ** (number / (SEQUENCES - 1)))) for number in range(SEQUENCES)]


def median_ms(run: Run, device: torch.device, repeats: int) -> float:
    """Median time of ``run``, after two runs that are not timed."""
    times = []
    for repeat in range(repeats + 2):
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        if repeat >= 2:
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(tensors: list[Tensor], pattern: DilatedPattern, repeats: int, edges: Any = None) -> dict[str, float]:
    """Milliseconds of forward and backward of ``q, k, v, dout``."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    dout = tensors[3]

    def forward() -> Tensor:
        out = dilated_attention(q, k, v, pattern, cu_seqlens=edges)
        assert isinstance(out, Tensor)
        return out

    with torch.no_grad():
        forward_ms = median_ms(forward, dout.device, repeats)
    out = forward()
    backward_ms = median_ms(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), dout.device, repeats)
    return {"forward_ms": forward_ms, "backward_ms": backward_ms, "both_ms": forward_ms + backward_ms}


def measured(rows: int, dim: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """All cases of one head dim."""
    dtype, heads = torch.bfloat16 if device.type == "cuda" else torch.float32, WIDTH // dim
    pattern = DilatedPattern.geometric(min(2048, rows), min(32768, rows))
    torch.manual_seed(0)
    tensors = [torch.randn(1, rows, heads, dim, device=device, dtype=dtype) for _ in range(4)]
    points: list[dict[str, Any]] = [{"case": "undivided", "rows": rows, **timed(tensors, pattern, repeats)}]
    for name, mean in MEANS.items():
        edges = document_edges(rows, mean * rows / MILLION if rows < MILLION else mean)
        point = {"case": name, "rows": rows, "documents": len(edges) - 1, **timed(tensors, pattern, repeats, edges)}
        points.append(point | {"ratio": point["both_ms"] / points[0]["both_ms"]})
    longest = rows // SEQUENCES
    lengths = sequence_lengths(longest)
    batch = [x.view(SEQUENCES, longest, heads, dim) for x in tensors]
    padded = timed(batch, pattern, repeats, [[0, length] for length in lengths])
    single = [timed([x[i : i + 1, :n] for x in batch], pattern, repeats) for i, n in enumerate(lengths)]
    alone = {name: sum(one[name] for one in single) for name in padded}
    points.append({"case": "one by one", "rows": sum(lengths), **alone})
    points.append({"case": "padded", "rows": sum(lengths), **padded, "ratio": padded["both_ms"] / alone["both_ms"]})
    kernels = describe_kernels(device, dtype, dim, tables=True)
    return [
        {"dim": dim, "heads": heads, "forward": kernels.forward, "backward": kernels.backward, **point}
        | {"ns_per_row": 1e6 * point["both_ms"] / point["rows"]}
        for point in points
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=MILLION)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=output_file, default=Path("benchmarks/results/documents.json"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with clocks() as found:
        points = [point for dim in options.dims for point in measured(options.rows, dim, device, options.repeats)]
    for point in points:
        time_of_row, ratio = point["ns_per_row"], point.get("ratio", 1.0)
        print(f"D {point['dim']:<4} {point['case']:12} {time_of_row:9.2f} ns a row {ratio:6.3f}")
    command = shlex.join(["python", *sys.argv])
    result = {"command": command, "environment": environment(), "gpu": found, "points": points}
    write_text(options.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
