"""What ``measure.py`` runs in processes of their own: one check, or the times of several candidates of a package.

    PYTHONPATH=PACKAGE python worker.py check|compile|time JSON

Prints a line ``RESULT JSON`` for each result. ``DEVICE=cpu`` tries the checks in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longnet_dist.attention.functional import AttentionSpec, attention_backward, attention_forward
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.kernels import hopper_kernel, triton_kernel

DEVICE = os.environ.get("DEVICE", "cuda")
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHRINK = 1 if DEVICE == "cuda" else 16
LARGEST_ERROR = {"out": 0.006, "lse": 1e-4, "dq": 0.006, "dk": 0.006, "dv": 0.006}  # relative, in norm
MILLION = 2**20


def use(candidate: dict[str, Any]) -> None:
    """Let the kernels run with a candidate's tiles."""
    if not candidate["tiles"]:
        return
    if candidate["kind"] == "forward":
        tiles = triton_kernel.Tiles(*candidate["tiles"])
        triton_kernel.forward_tiles = lambda *_: tiles
    else:
        hopper_kernel.TILES[candidate["dim"]] = tuple(candidate["tiles"])


def inputs(rows: int, heads: int, kv_heads: int, dim: int, batch: int = 1, loud: bool = False) -> list[Tensor]:
    """q, k, v, dout; ``loud``: scores that begin large and fall along the sequence."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(batch, rows, h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, dout = (torch.randn(shape, device=DEVICE, dtype=DTYPE, generator=generator) for shape in shapes)
    if loud:
        ramp = torch.linspace(8, -8, rows, device=DEVICE)[None, :, None, None]
        q, k = (3 * q.abs()).to(DTYPE), (k.abs() * ramp).to(DTYPE)
    return [q, k, v, dout]


def spec_of(backend: str, tensors: list[Tensor], pattern: DilatedPattern, causal: bool) -> AttentionSpec:
    return AttentionSpec.of(*tensors, pattern, causal, None, None, backend, False, True, None, None)


def check(candidate: dict[str, Any]) -> None:
    """Relative errors against the float64 reference: plain, ragged, grouped heads, for a forward also loud."""
    use(candidate)
    forward, dim = candidate["kind"] == "forward", candidate["dim"]
    cases = {
        "plain": ({"rows": 4096, "heads": 4, "kv_heads": 4, "dim": dim, "batch": 2}, [1024, 2048, 4096], [1, 2, 4]),
        "ragged": ({"rows": 2320, "heads": 4, "kv_heads": 4, "dim": dim}, [700, 1501, 2320], [1, 3, 6]),
        "grouped": ({"rows": 3008, "heads": 6, "kv_heads": 2, "dim": dim}, [1000, 3008], [1, 2]),
    }
    if forward:
        cases["loud"] = ({"rows": 2048, "heads": 2, "kv_heads": 2, "dim": dim, "loud": True}, [2048, 2048], [1, 2])
    errors: dict[str, float] = {}
    for name, (shape, lengths, rates) in cases.items():
        tensors = inputs(**(shape | {"rows": shape["rows"] // SHRINK}))
        pattern = DilatedPattern([w // SHRINK for w in lengths], rates)
        for causal in (True, False):
            for what, error in _errors(tensors, pattern, causal, forward).items():
                errors[f"{what} {name} {'causal' if causal else 'full'}"] = error
    bad = {key: error for key, error in errors.items() if not error < LARGEST_ERROR[key.split()[0]]}
    _result({"id": candidate["id"], "worst": max(errors.values()), "bad": bad})


def _errors(tensors: list[Tensor], pattern: DilatedPattern, causal: bool, forward: bool) -> dict[str, float]:
    *qkv, dout = tensors
    exact = [x.double() for x in qkv]
    reference = spec_of("reference", exact, pattern, causal)
    kernels = spec_of("triton", qkv, pattern, causal)
    out, lse, _ = attention_forward(*exact, reference)
    if forward:
        expected, actual = (out, lse), attention_forward(*qkv, kernels)[:2]
        names = ("out", "lse")
    else:
        expected = attention_backward(dout.double(), *exact, out, lse, [], reference)
        by_head = lse.float().transpose(1, 2).contiguous().transpose(1, 2)
        actual = attention_backward(dout, *qkv, out.to(DTYPE), by_head, [], kernels)
        names = ("dq", "dk", "dv")
    pairs = zip(names, actual, expected, strict=True)
    return {name: torch.nan_to_num((a.double() - b).norm() / b.norm(), nan=9.0).item() for name, a, b in pairs}


def compile_for_times(candidate: dict[str, Any]) -> None:
    """Run what ``time_all`` times once, on a few rows, so that its kernels are in the cache."""
    use(candidate)
    pattern, dim, forward = DilatedPattern.geometric(2048, 32768), candidate["dim"], candidate["kind"] == "forward"
    for _, kv_heads, causal in _cases(dim):
        tensors = inputs(MILLION // 16, 768 // dim, kv_heads, dim)
        _pass(tensors, spec_of("triton", tensors[:3], pattern, causal), forward)()
    torch.cuda.synchronize()
    _result({"id": candidate["id"], "bad": {}})


def _cases(dim: int) -> list[tuple[str, int, bool]]:
    """Name, key-value heads and mask of what is timed."""
    heads = 768 // dim
    return [("causal", heads, True), ("full", heads, False), *([("grouped", 4, True)] if dim == 64 else [])]


def time_all(candidates: list[dict[str, Any]]) -> None:
    """Milliseconds and TFLOP/s at a million rows of 768 numbers; all candidates have one kind and head dim."""
    kept = triton_kernel.forward_tiles, dict(hopper_kernel.TILES)
    pattern, dim = DilatedPattern.geometric(2048, 32768), candidates[0]["dim"]
    heads = 768 // dim
    for case, kv_heads, causal in _cases(dim):
        tensors = inputs(MILLION, heads, kv_heads, dim)
        for candidate in candidates:
            triton_kernel.forward_tiles = kept[0]
            hopper_kernel.TILES.update(kept[1])
            use(candidate)
            forward = candidate["kind"] == "forward"
            milliseconds = _median(_pass(tensors, spec_of("triton", tensors[:3], pattern, causal), forward))
            flops = pattern.flops(MILLION, heads, dim, causal, kv_heads) * (1 if forward else 2.5)
            _result({"id": candidate["id"], case: [milliseconds, flops / milliseconds / 1e9]})
        del tensors
        torch.cuda.empty_cache()


def _pass(tensors: list[Tensor], spec: AttentionSpec, forward: bool) -> Callable[[], object]:
    q, k, v, dout = tensors
    if forward:
        return lambda: attention_forward(q, k, v, spec)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), 8.0, device=DEVICE).transpose(1, 2)
    return lambda: attention_backward(dout, q, k, v, q, lse, [], spec)  # its time does not hang on true outputs


def _median(run: Callable[[], object]) -> float:
    times = []
    for _ in range(7):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[2:])


def _result(result: dict[str, Any]) -> None:
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    {"check": check, "compile": compile_for_times, "time": time_all}[sys.argv[1]](json.loads(sys.argv[2]))
