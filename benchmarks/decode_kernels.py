"""Time of the kernels that decode a token, in one layer of the paper's pattern, over the constants of their module.

    python benchmarks/decode_kernels.py [--shapes 1:12:1 64:12:1 64:4:3] [--output FILE.json]

A shape is ``texts : key/value heads : queries of each``. ``full`` texts are just before row ``2^power``, where they see
all slots; ``random`` ones are anywhere. Each of ``--layers`` layers has a cache of its own, so that no key comes from
the GPU's own caches. The layers are replayed as a CUDA graph; a time is that of one layer.

From the constants of ``attention/kernels/triton/decode.py`` on, each constant in turn takes all values that the command
line names, and the fastest stays. The share is that of ``--bandwidth`` at which keys and values that are seen are read.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment
from longnet_dist import DilatedPattern
from longnet_dist.attention.decoding import Grid
from longnet_dist.attention.kernels.triton import decode
from longnet_dist.attention.kernels.triton.keep import rotate_and_keep
from longnet_dist.attention.positions import Positions
from longnet_dist.ops.graphs import Graph

CONSTANTS = ("BLOCK", "WARPS", "STAGES", "PROGRAMS", "MOST_BLOCKS", "DOT_GROUP")


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Measure as the command line says."""
    options = _parser().parse_args(arguments)
    result: dict[str, Any] = {"environment": environment(), "points": []}
    for shape in options.shapes:
        texts, kv_heads, group = map(int, shape.split(":"))
        layers = Layers(texts, kv_heads, group, options)
        for visibility in ("full", "random"):
            layers.place(visibility)
            point = {"shape": shape, "visibility": visibility} | layers.measure()
            result["points"].append(point)
            print(json.dumps({name: value for name, value in point.items() if name != "attempts"}), flush=True)
            options.output.write_text(json.dumps(result, indent=1) + "\n")


class Layers:
    """Hold the caches of some layers, and time what a step does to each.

    Args:
        texts: number of texts ``B``.
        kv_heads: key/value heads ``Hkv``.
        group: queries of each.
        options: of the command line.
    """

    def __init__(self, texts: int, kv_heads: int, group: int, options: argparse.Namespace) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.texts, self.options, dim = texts, options, options.head_dim
        rows = 2**options.power
        self.grid = Grid.of(DilatedPattern.paper(), rows, kv_heads, dim, dtype, self.device, Positions())
        shape = 2, texts, kv_heads, self.grid.first[-1] + 1, dim
        self.records = [torch.randn(shape, device=self.device, dtype=dtype) for _ in range(options.layers)]
        joined = torch.randn(texts, 1, (group + 2) * kv_heads, dim, device=self.device, dtype=dtype)
        self.q, self.k, self.v = joined.split([group * kv_heads, kv_heads, kv_heads], 2)
        self.queries = self.q.reshape(texts, kv_heads, group, dim)

    def place(self, visibility: str) -> None:
        """Let the texts be at the rows that ``visibility`` says."""
        rows = torch.full((self.texts,), 2**self.options.power - 1)
        if visibility == "random":
            rows = torch.randint(2**self.options.power, rows.shape, generator=torch.Generator().manual_seed(0))
        self.present = self.grid.at(rows.to(self.device))

    def measure(self) -> dict[str, Any]:
        """Return times and shares with the fastest constants, and all attempts."""
        records = self.records[0]
        size = int(self.present.seen.sum()) * 2 * records.shape[-1] * records.element_size()
        best = {name: int(getattr(decode, name)) for name in CONSTANTS}
        attempts = [best | {"microseconds": self._attend(best)}]
        for name in CONSTANTS:
            if name == "DOT_GROUP" and self.queries.shape[2] == 1:
                continue
            for value in getattr(self.options, name.lower()):
                if value != best[name]:
                    constants = best | {name: value}
                    attempts = [*attempts, constants | {"microseconds": self._attend(constants)}]
            fastest = min(attempts, key=lambda attempt: attempt["microseconds"])
            best = {constant: int(fastest[constant]) for constant in CONSTANTS}
        seconds = 1e-6 * min(attempt["microseconds"] for attempt in attempts)
        return {
            "attend_microseconds": 1e6 * seconds,
            "bytes": size,
            "bandwidth_share": size / seconds / self.options.bandwidth,
            "constants": best,
            "with_the_module's_constants": attempts[0]["microseconds"],
            "rotate_and_keep_microseconds": self._time(self._keep),
            "visible_blocks_microseconds": self._time(lambda _: self._blocks().numbers),
            "attempts": attempts,
        }

    def _attend(self, constants: dict[str, int]) -> float:
        """Return the microseconds of the attention of a layer with some constants, infinite if they do not fit."""
        kept = {name: getattr(decode, name) for name in constants}
        try:
            for name, value in constants.items():
                setattr(decode, name, value)
            blocks = self._blocks()
            return self._time(lambda records: self._attended(records, blocks))
        except Exception as error:  # too much shared memory, say: the others go on
            print(f"{constants}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            return float("inf")
        finally:
            for name, value in kept.items():
                setattr(decode, name, value)

    def _attended(self, records: Tensor, blocks: decode.VisibleBlocks) -> Tensor:
        keys, values = records[:, :, :, :-1]
        return decode.attend_to_slots(self.queries, keys, values, self.present.seen, self.present.nothing, blocks)

    def _blocks(self) -> decode.VisibleBlocks:
        return decode.visible_blocks(self.present.seen, decode.block_size(*self.queries.shape[2:]))

    def _keep(self, records: Tensor) -> Tensor:
        return rotate_and_keep(self.q, self.k, self.v, records, self.present.slots, self.present.tables)

    def _time(self, function: Callable[[Tensor], Tensor]) -> float:
        """Return the microseconds of a layer, the median of some replays of all layers."""

        def step() -> Tensor:
            return [function(records) for records in self.records][-1]

        graph, times = Graph(step, step, self.device), []
        for _ in range(self.options.repeats + 2):
            self._wait()
            start = time.perf_counter()
            for _ in range(self.options.replays):
                graph()
            self._wait()
            times.append((time.perf_counter() - start) / self.options.replays)
        return 1e6 * statistics.median(times[2:]) / len(self.records)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", default=["1:12:1", "64:12:1", "64:4:3"])
    add("--head-dim", type=int, default=64)
    add("--power", type=int, default=20, help="texts of at most 2^power tokens")
    add("--layers", type=int, default=12)
    add("--replays", type=int, default=10, help="in a row, of all layers")
    add("--repeats", type=int, default=5)
    add("--bandwidth", type=float, default=4.3e12, help="bytes a second")
    add("--block", type=int, nargs="*", default=[32, 64, 128])
    add("--warps", type=int, nargs="*", default=[2, 4, 8])
    add("--stages", type=int, nargs="*", default=[1, 2, 3, 4])
    add("--programs", type=int, nargs="*", default=[3, 4, 6, 8])
    add("--most-blocks", type=int, nargs="*", default=[8, 16, 32])
    add("--dot-group", type=int, nargs="*", default=[2, 4])
    add("--output", type=Path, default=Path("benchmarks/results/decode_kernels.json"))
    return parser


if __name__ == "__main__":
    main()
