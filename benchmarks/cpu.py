"""Dilated attention on the CPU against dense attention, and its time a token from 8K to 128K rows.

    python benchmarks/cpu.py [--rows 32768] [--repeats 5] [--output benchmarks/results/cpu.json]

Forward and backward, float32, causal, the paper's pattern, 8 heads of 64; dense is torch's
``scaled_dot_product_attention`` on the same tensors in the same run. Medians; the JSON holds every repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment, output_file
from longnet_dist import DilatedPattern, dilated_attention

HEADS, HEAD_DIM = 8, 64
LENGTHS = (8192, 16384, 32768, 65536, 131072)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32768, help="rows of the comparison with dense attention")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=output_file, default=Path("benchmarks/results/cpu.json"))
    args = parser.parse_args()

    pattern = DilatedPattern.paper()
    calls = {f"dilated {rows}": (dilated(pattern), rows) for rows in sorted({*LENGTHS, args.rows})}
    calls[f"dense {args.rows}"] = (dense, args.rows)
    measure({"warm-up": calls[f"dilated {LENGTHS[0]}"]}, 1)
    seconds = measure(calls, args.repeats)

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    per_token = {rows: medians[f"dilated {rows}"] / rows for rows in LENGTHS}
    result = {
        "command": f"python benchmarks/cpu.py --rows {args.rows} --repeats {args.repeats}",
        "environment": environment(),
        "pattern": {"segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates},
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "seconds": seconds,
        "speedup_over_dense": medians[f"dense {args.rows}"] / medians[f"dilated {args.rows}"],
        "microseconds_per_token": {rows: 1e6 * value for rows, value in per_token.items()},
        "spread_per_token": max(per_token.values()) / min(per_token.values()) - 1,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result, medians, args.rows)


def dilated(pattern: DilatedPattern) -> Callable[..., Tensor]:
    """Dilated attention of ``(B, N, H, D)`` tensors."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = dilated_attention(q, k, v, pattern)
        assert isinstance(out, Tensor)
        return out

    return attend


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention; its layout is ``(B, H, N, D)``, and the transposes are views."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2)


def measure(calls: dict[str, tuple[Callable[..., Tensor], int]], repeats: int) -> dict[str, list[float]]:
    """Seconds of forward and backward of each call; the calls take turns, so that a drift of the machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with tqdm(total=repeats * len(calls), unit="run") as bar:
        for _ in range(repeats):
            for name, (call, rows) in calls.items():
                bar.set_description(name)
                q, k, v = (torch.randn(1, rows, HEADS, HEAD_DIM, requires_grad=True) for _ in range(3))
                dout = torch.randn(1, rows, HEADS, HEAD_DIM)
                start = time.perf_counter()
                call(q, k, v).backward(dout)
                seconds[name].append(time.perf_counter() - start)
                bar.update()
    return seconds


def print_table(result: dict[str, Any], medians: dict[str, float], rows: int) -> None:
    print(f"{'call':>16} {'seconds':>9} {'µs a token':>11}")
    for name, value in medians.items():
        print(f"{name:>16} {value:9.3f} {1e6 * value / int(name.split()[1]):11.3f}")
    print(f"dilated attention is {result['speedup_over_dense']:.1f}x faster than dense at {rows} rows")
    print(f"time a token varies by {100 * result['spread_per_token']:.1f} % from {LENGTHS[0]} to {LENGTHS[-1]} rows")


if __name__ == "__main__":
    main()
