"""Time of the kernels that decode a token, in one layer of the paper's pattern, over the constants of their module.

    python benchmarks/decode_kernels.py [--shapes 1:12:1 64:12:1 64:4:3] [--output FILE.json]

A shape is ``texts : key/value heads : queries of each``. ``full`` texts are just before row ``2^power``, where they see
all slots; ``random`` ones are anywhere. Each of ``--layers`` layers has a cache of its own, so that no key comes from
the GPU's own caches. The layers are replayed as a CUDA graph; a time is that of one layer.

From the constants of ``attention/kernels/triton/decode.py`` on, each constant in turn takes all values that the command
line names, and the fastest stays; with ``--linear`` those of ``ops/normed_linear/triton.py`` too. The share is that of
``--bandwidth`` at which keys and values that are seen are read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment, output_file
from longnet_dist import DilatedPattern
from longnet_dist.attention.decoding import Grid
from longnet_dist.attention.kernels.triton import decode
from longnet_dist.attention.kernels.triton.keep import rotate_and_keep
from longnet_dist.attention.positions import Positions
from longnet_dist.ops.graphs import Graph
from longnet_dist.ops.normed_linear import reference
from longnet_dist.ops.normed_linear import triton as normed_linear
from longnet_dist.ops.normed_linear.choice import NormedLinear

CONSTANTS = ("BLOCK", "WARPS", "STAGES", "PROGRAMS", "MOST_BLOCKS")


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
            print(json.dumps({name: value for name, value in point.items() if "attempts" not in name}), flush=True)
            options.output.write_text(json.dumps(result, indent=1) + "\n")


def fastest(
    module: ModuleType, values: Mapping[str, Sequence[int]], measure: Callable[[], float]
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Let each constant of a module in turn take its values; return all attempts and the fastest.

    An attempt has the constants and its microseconds, infinite if the kernels do not fit.
    """
    kept = {name: getattr(module, name) for name in values}

    def attempt(constants: Mapping[str, int]) -> dict[str, float]:
        try:
            for name, value in constants.items():
                setattr(module, name, value)
            microseconds = measure()
        except Exception as error:  # too much shared memory, say: the others go on
            print(f"{constants}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            microseconds = float("inf")
        return {**constants, "microseconds": microseconds}

    attempts = [attempt(kept)]
    for name in values:
        best = min(attempts, key=lambda found: found["microseconds"])
        constants = {constant: int(best[constant]) for constant in kept}
        attempts += [attempt(constants | {name: value}) for value in values[name] if value != constants[name]]
    for name, value in kept.items():
        setattr(module, name, value)
    return attempts, min(attempts, key=lambda found: found["microseconds"])


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
        records, options = self.records[0], self.options
        size = int(self.present.seen.sum()) * 2 * records.shape[-1] * records.element_size()
        values = {name: getattr(options, name.lower()) for name in CONSTANTS}
        attempts, best = fastest(decode, values, self._attend)
        seconds = 1e-6 * best["microseconds"]
        linear_values = {
            "COLUMNS": [16, 32, 64],
            "PIECE": [64, 128, 256, 512],
            "WARPS": [4, 8],
            "STAGES": [2, 3],
        }
        linears, best_linears = fastest(normed_linear, linear_values if options.linear else {}, self._linear)
        return {
            "attend_microseconds": best["microseconds"],
            "bytes": size,
            "bandwidth_share": size / seconds / options.bandwidth,
            "best": best,
            "with_the_module's_constants": attempts[0]["microseconds"],
            "rotate_and_keep_microseconds": self._time(self._keep),
            "visible_blocks_microseconds": self._time(lambda _: self._blocks().numbers),
            "best_linear": best_linears,
            "linear_of_torch": self._linear(reference.normed_linear),
            "attempts": attempts,
            "linear_attempts": linears,
        }

    def _attend(self) -> float:
        """Return the microseconds of the attention of a layer."""
        blocks = self._blocks()
        return self._time(lambda records: self._attended(records, blocks))

    def _linear(self, compute: NormedLinear = normed_linear.normed_linear) -> float:
        """Return the microseconds of the linear layers of a block, from norm to residual sum."""
        dim = self.q.shape[2] * self.q.shape[3]
        kv_dim, like = self.k.shape[2] * self.k.shape[3], {"device": self.device, "dtype": self.q.dtype}
        norm, inner_norm = torch.nn.LayerNorm(dim, **like), torch.nn.LayerNorm(4 * dim, **like)
        q, k, v, out, fc1, fc2 = (
            torch.nn.Linear(*sizes, **like)
            for sizes in ((dim, dim), (dim, kv_dim), (dim, kv_dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim))
        )
        x = self.q.flatten(1)

        def block(_: Tensor) -> Tensor:
            compute(x, norm, [q, k, v])
            y = compute(x, norm, [out], x)
            return compute(compute(y, norm, [fc1], gelu=True), inner_norm, [fc2], y)

        return self._time(block)

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
    add("--linear", action="store_true", help="also over the constants of ops/normed_linear")
    add("--output", type=output_file, default=Path("benchmarks/results/decode_kernels.json"))
    return parser


if __name__ == "__main__":
    main()
