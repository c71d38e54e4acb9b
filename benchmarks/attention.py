"""Dilated attention on one GPU: time and memory beside dense kernels, torchscale, and errors.

    python benchmarks/attention.py [--sections speed torchscale accuracy] [--only CASE ...] [--output FOLDER]

Prints tables and writes ``attention.json``, anew after every line, and ``attention.png``. A rate counts the attended
(query, key) pairs of every branch, 4·D FLOPs a pair forward, 10·D backward, also those that several branches hold and
that are computed once: ``computed_share`` says how many there are. The dense rate is that of the fastest kernel found
(``attention_peers.py``) on N / 2048 sequences of 2,048 rows. The section ``torchscale`` needs a checkout of
github.com/microsoft/torchscale, whose path the environment variable TORCHSCALE names.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks import pictures
from benchmarks.attention_accuracy import compare
from benchmarks.attention_peers import Attend, dense_kernels, torchscale_attention
from benchmarks.pictures import save_picture
from benchmarks.record import clocks, environment
from longnet_dist.attention.functional import dilated_attention
from longnet_dist.geometry.overlap import computed_share
from longnet_dist.geometry.pattern import DilatedPattern

MILLION = 1 << 20
ROWS = 2048


@dataclass(frozen=True)
class Case:
    """One row of the table; ``longest`` is the longest segment of the geometric pattern, 0 for the paper's pattern."""

    name: str
    rows: int = MILLION
    heads: int = 12
    kv_heads: int = 12
    dim: int = 64
    causal: bool = True
    longest: int = 32768

    @property
    def pattern(self) -> DilatedPattern:
        return DilatedPattern.geometric(ROWS, self.longest) if self.longest else DilatedPattern.paper()


CASES = (
    Case("causal"),
    Case("bidirectional", causal=False),
    Case("D 128 causal", heads=6, kv_heads=6, dim=128),
    Case("D 128 bidirectional", heads=6, kv_heads=6, dim=128, causal=False),
    Case("grouped 12/4", kv_heads=4),
    Case("paper pattern", longest=0),
    Case("32,768 rows", rows=32768),
    Case("up to N, 131,072 rows", rows=1 << 17, longest=1 << 17),
    Case("up to N, 1,048,576 rows", longest=MILLION),
    Case("up to N, 4,194,304 rows", rows=4 * MILLION, longest=4 * MILLION),
)


def median_ms(run: Callable[[], Any], repeats: int = 7) -> float:
    """Median time of ``run`` on the device, after two runs that are not timed."""
    times = []
    for repeat in range(repeats + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(stop))
    return statistics.median(times)


def extra_bytes(run: Callable[[], Any]) -> int:
    """Peak memory of ``run`` beyond what was there before and what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    returned = sum(x.numel() * x.element_size() for x in ([result] if isinstance(result, Tensor) else result))
    return torch.cuda.max_memory_allocated() - before - returned


def inputs(case: Case, batch: int, rows: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, ``(batch, rows, heads, D)`` bfloat16."""
    torch.manual_seed(0)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    made = [torch.randn(batch, rows, h, case.dim, device="cuda", dtype=torch.bfloat16) for h in heads]
    return [x.requires_grad_() for x in made[:3]] + made[3:]


def measure(case: Case, backend: str) -> dict[str, Any]:
    """Times, rates and memory of dilated attention."""
    q, k, v, dout = inputs(case, 1, case.rows)
    attend = partial(dilated_attention, pattern=case.pattern, causal=case.causal, backend=backend)
    flops = case.pattern.flops(case.rows, case.heads, case.dim, case.causal, case.kv_heads)
    with torch.no_grad():
        forward = median_ms(lambda: attend(q, k, v))
        forward_extra = extra_bytes(lambda: attend(q, k, v))
    out = attend(q, k, v)
    assert isinstance(out, Tensor)
    gradients = partial(torch.autograd.grad, out, (q, k, v), dout, retain_graph=True)
    with clocks() as found:
        backward = median_ms(gradients)
    forward_rate, both_rate = rate(flops, forward, forward + backward)
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "both_ms": forward + backward,
        "ns_per_row": (forward + backward) * 1e6 / case.rows,
        "forward_tflops": forward_rate,
        "both_tflops": both_rate,
        "forward_extra_share_of_output": forward_extra / (out.numel() * out.element_size()),
        "backward_extra_share_of_float32_dq": extra_bytes(gradients) / (q.numel() * 4),
        "gpu": found,
    }


def dense_rates(case: Case) -> dict[str, tuple[float, float]]:
    """``(forward, forward + backward)`` in TFLOP/s of each dense kernel on sequences of 2,048 rows."""
    batch = min(case.rows, MILLION) // ROWS
    q, k, v, dout = inputs(case, batch, ROWS)
    pairs = ROWS * (ROWS + 1) // 2 if case.causal else ROWS * ROWS
    flops = 4 * case.dim * case.heads * batch * pairs
    return {name: rate(flops, *times(attend, q, k, v, dout)) for name, attend in dense_kernels(case.causal).items()}


def times(attend: Attend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[float, float]:
    """Milliseconds of forward, and of forward and backward."""
    with torch.no_grad():
        forward = median_ms(lambda: attend(q, k, v))
    out = attend(q, k, v)
    return forward, forward + median_ms(partial(torch.autograd.grad, out, (q, k, v), dout, retain_graph=True))


def rate(flops: int, forward_ms: float, both_ms: float) -> tuple[float, float]:
    """TFLOP/s of forward, and of forward and backward."""
    return flops / forward_ms / 1e9, 3.5 * flops / both_ms / 1e9


def beside_torchscale(case: Case, backend: str, checkout: Path) -> dict[str, Any]:
    """torchscale's times and memory, and ours on the same tensors; in turns, so that both find the device as warm."""
    q, k, v, dout = inputs(case, 1, case.rows)
    ours = partial(dilated_attention, pattern=case.pattern, causal=case.causal, backend=backend)
    theirs = torchscale_attention(checkout, case.pattern, case.heads, case.dim, case.causal)
    result: dict[str, Any] = {"case": asdict(case)}
    peers: dict[str, Any] = {"ours": ours, "torchscale": theirs}
    rounds: list[dict[str, tuple[float, float]]] = []
    states: dict[str, dict[str, float]] = {}
    for _ in range(3):
        rounds.append({})
        for name, attend in peers.items():
            with clocks() as states[name]:
                rounds[-1][name] = times(attend, q, k, v, dout)
    for name, attend in peers.items():
        forward, both = (statistics.median(values) for values in zip(*(each[name] for each in rounds), strict=True))

        def step(attend: Attend = attend) -> tuple[Tensor, ...]:
            out = attend(q, k, v)
            return out, *torch.autograd.grad(out, (q, k, v), dout)

        result[name] = {
            "forward_ms": forward,
            "both_ms": both,
            "extra_gib": extra_bytes(step) / 2**30,
            "rounds": [each[name] for each in rounds],
            "gpu": states[name],
        }
    result["times_as_fast"] = result["torchscale"]["both_ms"] / result["ours"]["both_ms"]
    return result


def compile_kernels(case: Case, backend: str) -> None:
    """Compile what the case needs, in a process of its own, so that all cases do it at the same time."""
    q, k, v, dout = inputs(case, 1, 2 * ROWS)
    pattern = DilatedPattern([ROWS, 2 * ROWS], [1, 2])
    out = dilated_attention(q, k, v, pattern, causal=case.causal, backend=backend)
    torch.autograd.grad(out, (q, k, v), dout)


def speed(cases: list[Case], backend: str, save: Callable[[str, Any], None]) -> None:
    """The table of cases."""
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        pool.starmap(compile_kernels, [(case, backend) for case in cases])
    results: list[dict[str, Any]] = []
    rates: dict[Case, dict[str, tuple[float, float]]] = {}
    print(f"{'case':26}{'forward':>9}{'both ms':>9}{'TFLOP/s':>9}{'dense':>7}{'share':>7}{'fwd mem':>9}{'bwd mem':>9}")
    for case in cases:
        shape = replace(case, name="", rows=min(case.rows, MILLION) if case.rows == 32768 else MILLION, longest=1)
        if shape not in rates:
            rates[shape] = dense_rates(shape)
        dense = rates[shape]
        best = max(both for _, both in dense.values())
        result = {"case": asdict(case), "dense": dense, "dense_tflops": best, **measure(case, backend)}
        result["share_of_dense"] = result["both_tflops"] / best
        result["computed_share"] = computed_share(case.pattern, case.rows, case.kv_heads, case.causal)
        results.append(result)
        print(
            f"{case.name:26}{result['forward_ms']:9.2f}{result['both_ms']:9.2f}{result['both_tflops']:9.0f}{best:7.0f}"
            f"{result['share_of_dense']:7.2f}{result['forward_extra_share_of_output']:9.3f}"
            f"{result['backward_extra_share_of_float32_dq']:9.3f}",
            flush=True,
        )
        save("results", results)


def peer(cases: list[Case], backend: str, save: Callable[[str, Any], None]) -> None:
    """torchscale and ours, side by side."""
    checkout = os.environ.get("TORCHSCALE")
    if not checkout:
        print("torchscale is left out: TORCHSCALE names no checkout of github.com/microsoft/torchscale")
        return
    results = []
    for case in cases:
        results.append(beside_torchscale(case, backend, Path(checkout)))
        ours, theirs = results[-1]["ours"], results[-1]["torchscale"]
        print(
            f"torchscale, {case.rows:,} rows: {theirs['forward_ms']:.1f} / {theirs['both_ms']:.1f} ms, "
            f"{theirs['extra_gib']:.1f} GiB; ours {ours['forward_ms']:.1f} / {ours['both_ms']:.1f} ms, "
            f"{ours['extra_gib']:.1f} GiB: {results[-1]['times_as_fast']:.1f} times as fast",
            flush=True,
        )
        save("torchscale", results)


def accuracy(shapes: int, backend: str, save: Callable[[str, Any], None]) -> None:
    """Random shapes, several at a time, for most of the time goes into compiling."""
    results: list[dict[str, Any]] = []
    torch.cuda.empty_cache()  # the other processes need what the other sections held
    with multiprocessing.get_context("spawn").Pool(12) as pool:
        for result in pool.imap_unordered(partial(compare, backend=backend), range(shapes)):
            results.append(result)
            save("accuracy", sorted(results, key=lambda result: result["seed"]))
    worst = max(results, key=lambda result: result["ratio"])
    print(
        f"{shapes} random shapes: at worst {worst['ratio']:.2f} times FlashAttention-2's error (seed {worst['seed']})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--sections", nargs="+", default=["speed", "torchscale", "accuracy"])
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--shapes", type=int, default=50, help="random shapes of the section accuracy")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python benchmarks/attention.py", *sys.argv[1:]])
    peers = {name: version(name) for name in ("flash-attn", "flash-attn-4") if list(distributions(name=name))}
    document: dict[str, Any] = {
        "environment": {**environment(), "triton": triton.__version__, **peers, "command": command}
    }

    def save(part: str, found: Any) -> None:
        document[part] = found
        (options.output / "attention.json").write_text(json.dumps(document, indent=1) + "\n")

    if "speed" in options.sections:
        speed([case for case in CASES if not options.only or case.name in options.only], options.backend, save)
    if "torchscale" in options.sections:
        peer([Case("paper pattern", longest=0), Case("32,768 rows", 32768, longest=0)], options.backend, save)
    if "accuracy" in options.sections:
        accuracy(options.shapes, options.backend, save)
    if "results" in document:
        save_picture(pictures.attention(document), options.output / "attention.png")


if __name__ == "__main__":
    main()
