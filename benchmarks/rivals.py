"""Forward and backward of a million tokens by dilated attention and by what others would use, in ns a token.

    python benchmarks/rivals.py --output benchmarks/results/rivals_h200.json [--only NAME ...]
    python benchmarks/rivals.py --device cpu --smoke --output FILE

Inputs have 12 heads of 64 channels in bf16; projections and norms are left out. On a GPU every rival is a process of
its own, so that one that fails leaves the others alone. Its error is in the JSON, and so is that it is not installed.
Dense attention and FlexAttention run at shorter lengths. ``--smoke`` takes 256 tokens, to see that all can run.

* ours: the geometric pattern up to 32,768 tokens and up to all, the paper's pattern, documents of 256 to 65,536;
* flash-attn 4 with sliding windows; gated delta rule, simple GLA and NSA of fla (16 query heads for one key head);
* FlexAttention with the mask and the weights of the paper's pattern, which computes what ours does, not backward on a
  CPU;
* cuDNN's causal attention.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import clocks, environment, output_file
from longnet_dist import DilatedPattern, dilated_attention

MILLION, SMOKE_ROWS, DIM = 1 << 20, 256, 64
PACKAGES = ("flash-attn-4", "fla-core", "triton", "tilelang")
Step = Callable[[], Any]


@dataclass(frozen=True)
class Rival:
    """One line of the table.

    Attributes:
        name: of the line.
        make: takes the tokens and the device; returns the function to time, its forward and the width.
        rows: tokens on a GPU.
        gpu: whether it runs on a GPU alone.
    """

    name: str
    make: Callable[[int, torch.device], tuple[Step, Step, int]]
    rows: int = MILLION
    gpu: bool = False


def inputs(
    rows: int, device: torch.device, heads: int = 12, kv_heads: int = 12
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the output, ``(1, rows, heads, 64)``; bf16 on a GPU, else float32."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, dout = (
        torch.randn(1, rows, h, DIM, device=device, dtype=dtype) for h in (heads, kv_heads, kv_heads, heads)
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def steps(attend: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor) -> tuple[Step, Step, int]:
    """Forward and backward of ``attend`` of the first three leaves, its forward alone, and the width."""

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(*(leaf.detach() for leaf in leaves[:3]))

    return lambda: torch.autograd.grad(attend(*leaves[:3]), leaves, dout), forward, dout.shape[2] * DIM


def ours(pattern: Callable[[int], DilatedPattern], documents: bool, rows: int, device: torch.device) -> Any:
    """Dilated attention, of one document or of many."""
    *qkv, dout = inputs(rows, device)
    edges = document_edges(rows) if documents else None
    attend = partial(dilated_attention, pattern=pattern(rows), cu_seqlens=edges)
    return steps(attend, qkv, dout)  # type: ignore[arg-type]


def geometric(longest: int | None, rows: int) -> DilatedPattern:
    """The geometric pattern up to ``longest`` tokens, or to all."""
    return DilatedPattern.geometric(min(2048, rows // 4), min(longest or rows, rows))


def paper(rows: int) -> DilatedPattern:
    """The paper's pattern, or one with its rates for few tokens."""
    return DilatedPattern.paper() if rows >= 32768 else DilatedPattern([rows // 16, rows // 8, rows // 2], [1, 2, 6])


def document_edges(rows: int) -> list[int]:
    """Edges of documents of lengths that are uniform in their logarithm."""
    generator, edges = torch.Generator().manual_seed(0), [0]
    while edges[-1] < rows:
        power = 8 + 8 * torch.rand((), generator=generator).item()
        edges.append(min(rows, edges[-1] + int(2**power)))
    return edges


def flash_window(window: int, rows: int, device: torch.device) -> Any:
    """flash-attn 4: a token sees ``window`` tokens, itself included."""
    from flash_attn.cute import flash_attn_func

    *qkv, dout = inputs(rows, device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, causal=True, window_size=(window - 1, 0))
        return out[0] if isinstance(out, tuple) else out

    return steps(attend, qkv, dout)


def gated_delta(rows: int, device: torch.device) -> Any:
    """The gated delta rule of fla; gate and step size have gradients too."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, dout = inputs(rows, device)
    gate = F.logsigmoid(torch.randn(1, rows, 12, device=device)).requires_grad_()
    beta = torch.rand(1, rows, 12, device=device, dtype=q.dtype).requires_grad_()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = chunk_gated_delta_rule(q, k, v, gate, beta, use_qk_l2norm_in_kernel=True)[0]
        return out

    return steps(attend, [q, k, v, gate, beta], dout)


def simple_gla(rows: int, device: torch.device) -> Any:
    """Gated linear attention of fla with a gate for each head."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v, dout = inputs(rows, device)
    gate = F.logsigmoid(torch.randn(1, rows, 12, device=device)).requires_grad_()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = chunk_simple_gla(q, k, v, gate)[0]
        return out

    return steps(attend, [q, k, v, gate], dout)


def nsa(rows: int, device: torch.device) -> Any:
    """Native sparse attention of fla, which wants 16 query heads for a key head: 1,024 channels.

    Its sliding window, a third of its parts, is left out: for that it calls flash-attn 2.
    """
    from fla.ops.nsa import parallel_nsa

    q, k, v, dout = inputs(rows, device, 16, 1)
    gates = [torch.rand(1, rows, 16, device=device, dtype=q.dtype).requires_grad_() for _ in range(2)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = parallel_nsa(q, k, v, *gates, block_counts=16, block_size=64)
        return out

    return steps(attend, [q, k, v, *gates], dout)


def flex(rows: int, device: torch.device) -> Any:
    """FlexAttention with the paper's pattern: the score of a pair grows by the logarithm of its branches' number."""
    *qkv, dout = inputs(rows, device)
    return steps(flex_attend(paper(rows), rows, 12, device), qkv, dout)


def flex_attend(pattern: DilatedPattern, rows: int, heads: int, device: torch.device) -> Callable[..., Tensor]:
    """Causal dilated attention of ``(1, rows, heads, D)`` tensors by torch's FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    branches = list(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True))

    def count(h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found = torch.zeros_like(i + j + h)
        for length, rate in branches:
            kept = (i % length % rate == h % rate) & (j % length % rate == h % rate)
            found = found + ((i // length == j // length) & kept & (j <= i)).to(found.dtype)
        return found

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return count(h, i, j) > 0

    def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return value + torch.log(count(h, i, j).clamp(min=1).to(value.dtype))

    compiled = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    blocks = create_block_mask(mask, None, heads, rows, rows, device=str(device), _compile=device.type == "cuda")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = compiled(q, k, v, score_mod=score, block_mask=blocks)
        return out.transpose(1, 2)

    return attend


def dense(rows: int, device: torch.device) -> Any:
    """Causal attention to all earlier tokens, by cuDNN on a GPU."""
    *qkv, dout = inputs(rows, device)
    kernels = [SDPBackend.CUDNN_ATTENTION] if device.type == "cuda" else [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(kernels):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return steps(attend, qkv, dout)


RIVALS = (
    Rival("ours, geometric to 32,768", partial(ours, partial(geometric, 32768), False)),
    Rival("ours, geometric to all", partial(ours, partial(geometric, None), False)),
    Rival("ours, paper", partial(ours, paper, False)),
    Rival("ours, documents", partial(ours, paper, True)),
    Rival("flash-attn 4, window 1,024", partial(flash_window, 1024), gpu=True),
    Rival("flash-attn 4, window 2,048", partial(flash_window, 2048), gpu=True),
    Rival("gated delta rule", gated_delta, gpu=True),
    Rival("simple GLA", simple_gla, gpu=True),
    Rival("NSA without its window", nsa, gpu=True),
    Rival("ours, paper, 32,768 tokens", partial(ours, paper, False), rows=32768),
    Rival("FlexAttention, paper, 32,768 tokens", flex, rows=32768),
    Rival("dense, 32,768 tokens", dense, rows=32768),
    Rival("dense, 131,072 tokens", dense, rows=131072),
)


def measure(rival: Rival, device: torch.device, smoke: bool, repeats: int) -> dict[str, Any]:
    """Time a rival, or say why it did not run."""
    rows = SMOKE_ROWS if smoke else rival.rows
    found: dict[str, Any] = {"name": rival.name, "rows": rows}
    if rival.gpu and device.type != "cuda":
        return found | {"error": "it runs on a GPU alone"}
    try:
        both, forward, width = rival.make(rows, device)
        with clocks() as gpu:
            times = {"forward": milliseconds(forward, device, repeats), "both": milliseconds(both, device, repeats)}
    except ImportError as error:
        return found | {"error": f"not installed: {error}"}
    except Exception as error:  # a rival may fail in any way, and that is a result
        return found | {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    medians = {name: statistics.median(values) for name, values in times.items()}
    return found | {
        "width": width,
        "forward_ms": medians["forward"],
        "both_ms": medians["both"],
        "ns_per_token": 1e6 * medians["both"] / rows,
        "all_ms": times,
        "gpu": gpu,
    }


def milliseconds(run: Step, device: torch.device, repeats: int) -> list[float]:
    """Times of ``run``, after two runs that are not timed."""
    times = []
    for repeat in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if repeat >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    return times


def alone(rival: Rival, options: argparse.Namespace) -> dict[str, Any]:
    """Time a rival in a process of its own."""
    words = ["--one", rival.name, "--device", options.device, "--repeats", str(options.repeats)]
    command = [sys.executable, __file__, *words, *["--smoke"] * options.smoke]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.seconds)
    except subprocess.TimeoutExpired:
        return {"name": rival.name, "error": f"no result after {options.seconds} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"name": rival.name, "error": f"exit status {done.returncode}: {done.stderr[-500:]}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure as the command line says."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    if options.one:
        (rival,) = (rival for rival in RIVALS if rival.name == options.one)
        print(json.dumps(measure(rival, device, options.smoke, options.repeats)))
        return
    facts = environment() | {name: version(name) for name in PACKAGES if list(distributions(name=name))}
    result: dict[str, Any] = {"environment": facts, "rivals": []}
    for rival in RIVALS:
        if options.only and rival.name not in options.only:
            continue
        run = partial(alone, rival, options) if device.type == "cuda" else None
        found = run() if run else measure(rival, device, options.smoke, options.repeats)
        result["rivals"].append(found)
        value = found.get("error") or f"{found['ns_per_token']:.1f} ns a token, forward {found['forward_ms']:.2f} ms"
        print(f"{rival.name:38}{value}", flush=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda or cpu")
    add("--smoke", action="store_true", help=f"{SMOKE_ROWS} tokens of every rival")
    add("--only", nargs="+", metavar="NAME")
    add("--repeats", type=int, default=7)
    add("--seconds", type=int, default=150, help="most that a rival may take, with compiling")
    add("--one", metavar="NAME", help=argparse.SUPPRESS)
    add("--output", type=output_file, default=Path("benchmarks/results/rivals.json"))
    return parser


if __name__ == "__main__":
    main()
