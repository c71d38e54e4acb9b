"""What a rank needs to set up its exchange at scale, without GPUs or other ranks: seconds, records, bytes.

    python benchmarks/exchange_plans.py [--output benchmarks/results/exchange_plans.json]

A causal sequence, 12 heads of 64, geometric pattern from 2,048 up to all rows. The seconds are those of a rank's first
call: the plan and the index tensors of forward and backward; later calls find them. The largest over sampled ranks.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment, output_file
from longnet_dist.comm.transfer import CompactBuffers, _groups, _send_places, _slots
from longnet_dist.geometry.exchange_plan import plan_exchange
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import Shards

HEADS, DIM, BASE = 12, 64, 2048
CPU = torch.device("cpu")


def set_up(rows: int, ranks: int, rank: int) -> dict[str, Any]:
    """Seconds of a rank's first call, and what it then exchanges in every call."""
    for cached in (plan_exchange, _send_places, _slots, _groups):
        cached.cache_clear()
    began = time.perf_counter()
    plan = plan_exchange(DilatedPattern.geometric(BASE, rows), Shards.even(rows, ranks), rank, HEADS, True)
    buffers = CompactBuffers(plan.segments, HEADS, torch.empty(1, 0, HEADS, 1), torch.bfloat16)
    buffers.slots(plan)
    _send_places(plan, CPU)
    _groups(plan, CPU)
    seconds = time.perf_counter() - began
    sent, received = sum(plan.send_counts), sum(plan.receive_counts)
    return {"seconds": seconds, "records_sent": sent, "records_received": received}


def largest(rows: int, ranks: int) -> dict[str, Any]:
    """Over sampled ranks, each first, middle or last of something."""
    sampled = sorted({0, 1, ranks // 3, ranks // 2, ranks - 2, ranks - 1})
    found = [set_up(rows, ranks, rank) for rank in sampled]
    most = {name: max(answer[name] for answer in found) for name in found[0]}
    return {"rows": rows, "ranks": ranks, **most, "received_bytes": most["records_received"] * 2 * DIM * 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--powers", type=int, nargs="+", default=[24, 27, 30], help="sequences of 2^p rows")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024, 4096])
    parser.add_argument("--output", type=output_file, default=Path("benchmarks/results/exchange_plans.json"))
    options = parser.parse_args()
    largest(2**16, 2)  # imports and first calls
    points = []
    print("ranks        rows   seconds   records received   MB (bf16)")
    for ranks in options.ranks:
        for power in options.powers:
            point = largest(2**power, ranks)
            points.append(point)
            megabytes = point["received_bytes"] / 1e6
            print(f"{ranks:5} {2**power:11} {point['seconds']:9.3f} {point['records_received']:18} {megabytes:11.2f}")
    command = shlex.join(["python", *sys.argv])
    options.output.write_text(
        json.dumps({"command": command, "environment": environment(), "points": points}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
