"""Time and memory of dilated attention on one GPU, beside dense kernels at the same segment shape.

    python benchmarks/attention.py [--output benchmarks/results] [--backend auto] [--only NAME ...]

Prints a table and writes ``attention.json`` and ``attention.png``. A rate counts the attended (query, key) pairs alone:
4·D FLOPs a pair forward, 10·D backward. The dense rate is that of the fastest kernel found (cuDNN and
FlashAttention-2 of torch; flash-attn 4 if installed) on N / 2048 sequences of 2,048 rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment
from longnet_dist.attention.functional import dilated_attention
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
    gradients = partial(torch.autograd.grad, out, (q, k, v), dout, retain_graph=True)
    backward = median_ms(gradients)
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "both_ms": forward + backward,
        "ns_per_row": (forward + backward) * 1e6 / case.rows,
        "forward_tflops": flops / forward / 1e9,
        "both_tflops": 3.5 * flops / (forward + backward) / 1e9,
        "forward_extra_share_of_output": forward_extra / (out.numel() * out.element_size()),
        "backward_extra_share_of_float32_dq": extra_bytes(gradients) / (q.numel() * 4),
    }


def dense_rates(case: Case) -> dict[str, tuple[float, float]]:
    """``(forward, forward + backward)`` TFLOP/s of each dense kernel on sequences of 2,048 rows."""
    batch = min(case.rows, MILLION) // ROWS
    q, k, v, dout = inputs(case, batch, ROWS)
    pairs = ROWS * (ROWS + 1) // 2 if case.causal else ROWS * ROWS
    flops = 4 * case.dim * case.heads * batch * pairs
    kernels: dict[str, Callable[[], Tensor]] = {}
    for name, kernel in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FlashAttention-2", SDPBackend.FLASH_ATTENTION)):
        kernels[name] = partial(_torch_attention, kernel, q, k, v, case)
    if importlib.util.find_spec("flash_attn"):
        from flash_attn.cute import flash_attn_func

        kernels["flash-attn 4"] = lambda: flash_attn_func(q, k, v, causal=case.causal)
    rates = {}
    for name, attend in kernels.items():
        with torch.no_grad():
            forward = median_ms(attend)
        out = attend()
        out = out[0] if isinstance(out, tuple) else out
        backward = median_ms(partial(torch.autograd.grad, out, (q, k, v), dout, retain_graph=True))
        rates[name] = (flops / forward / 1e9, 3.5 * flops / (forward + backward) / 1e9)
    return rates


def _torch_attention(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(kernel):
        grouped = case.heads != case.kv_heads
        return scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped).transpose(1, 2)


def compile_kernels(case: Case, backend: str) -> None:
    """Compile what the case needs, in a process of its own, so that all cases do it at the same time."""
    q, k, v, dout = inputs(case, 1, 2 * ROWS)
    pattern = DilatedPattern([ROWS, 2 * ROWS], [1, 2])
    out = dilated_attention(q, k, v, pattern, causal=case.causal, backend=backend)
    torch.autograd.grad(out, (q, k, v), dout)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """The rate of each case as bars, the dense rate as a line on each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(results) + 1.5))
    names = [result["case"]["name"] for result in results]
    axes.barh(names, [result["both_tflops"] for result in results], color="tab:blue", label="dilated attention")
    axes.plot(
        [r["dense_tflops"] for r in results], names, "k|", markersize=18, label="fastest dense kernel, 2,048 rows"
    )
    axes.set_xlabel("TFLOP/s, forward + backward")
    axes.invert_yaxis()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--only", nargs="*", help="names of cases")
    options = parser.parse_args()
    cases = [case for case in CASES if not options.only or case.name in options.only]
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        pool.starmap(compile_kernels, [(case, options.backend) for case in cases])
    options.output.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    rates: dict[Case, dict[str, tuple[float, float]]] = {}
    print(f"{'case':26}{'forward':>9}{'both ms':>9}{'TFLOP/s':>9}{'dense':>7}{'share':>7}{'fwd mem':>9}{'bwd mem':>9}")
    for case in cases:
        shape = replace(case, name="", rows=min(case.rows, MILLION) if case.rows == 32768 else MILLION, longest=1)
        if shape not in rates:
            rates[shape] = dense_rates(shape)
        dense = rates[shape]
        best = max(both for _, both in dense.values())
        result = {"case": asdict(case), "dense": dense, "dense_tflops": best, **measure(case, options.backend)}
        result["share_of_dense"] = result["both_tflops"] / best
        results.append(result)
        print(
            f"{case.name:26}{result['forward_ms']:9.2f}{result['both_ms']:9.2f}{result['both_tflops']:9.0f}{best:7.0f}"
            f"{result['share_of_dense']:7.2f}{result['forward_extra_share_of_output']:9.3f}"
            f"{result['backward_extra_share_of_float32_dq']:9.3f}",
            flush=True,
        )
        command = " ".join(["python benchmarks/attention.py", *sys.argv[1:]])
        facts = {**environment(), "triton": triton.__version__, "command": command}
        document = {"environment": facts, "results": results}
        (options.output / "attention.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(results, options.output / "attention.png")


if __name__ == "__main__":
    main()
