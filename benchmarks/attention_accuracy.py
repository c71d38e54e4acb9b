"""Errors of dilated attention on random shapes, as a ratio to those of dense FlashAttention-2 on the same tensors."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_peers import dense_kernels
from longnet_dist.attention.functional import dilated_attention
from longnet_dist.attention.kernels.reference import oracle
from longnet_dist.geometry.overlap import computed_share
from longnet_dist.geometry.pattern import DilatedPattern

NAMES = ("out", "dq", "dk", "dv")


def compare(seed: int, backend: str) -> dict[str, Any]:
    """One random problem: shape, relative errors ``‖x - x64‖ / ‖x64‖`` against the float64 oracle, and their ratios."""
    rng = random.Random(seed)
    rows, kv_heads, group = rng.randint(200, 1500), rng.randint(1, 3), rng.choice([1, 1, 2, 3])
    pattern = random_pattern(rng, rows)
    dim, causal = rng.choice([32, 64, 64, 80, 96, 128, 128, 256]), rng.random() < 0.5
    dtype = rng.choice([torch.bfloat16, torch.float16])
    generator = torch.Generator().manual_seed(seed)
    heads = (kv_heads * group, kv_heads, kv_heads, kv_heads * group)
    tensors = [torch.randn(2, rows, h, dim, generator=generator).to("cuda", dtype) for h in heads]
    ours = _errors(
        lambda q, k, v: dilated_attention(q, k, v, pattern, causal=causal, backend=backend), tensors, pattern, causal
    )
    dense = _errors(dense_kernels(causal)["FlashAttention-2"], tensors, DilatedPattern([rows], [1]), causal)
    return {
        "seed": seed,
        "rows": rows,
        "heads": heads[0],
        "kv_heads": kv_heads,
        "dim": dim,
        "dtype": str(dtype).removeprefix("torch."),
        "causal": causal,
        "pattern": str(pattern),
        "computed_share": computed_share(pattern, rows, kv_heads, causal),
        "errors": dict(zip(NAMES, ours, strict=True)),
        "dense_errors": dict(zip(NAMES, dense, strict=True)),
        "ratio": max(a / b for a, b in zip(ours, dense, strict=True)),
    }


def random_pattern(rng: random.Random, rows: int) -> DilatedPattern:
    """Half of the time branches of any lengths and rates, else a chain whose branches overlap, and perhaps another."""
    if rng.random() < 0.5:
        branches = rng.randint(1, 3)
        lengths = [rows] + [rng.randint(50, rows) for _ in range(branches - 1)]
        return DilatedPattern(lengths, [rng.randint(1, 6) for _ in lengths], rng.choice(["modulo", "blocked"]))
    branches, rates = rng.randint(2, 4), [rng.choice([1, 1, 2, 3])]
    for _ in range(branches - 1):
        rates.append(rates[-1] * rng.choice([1, 2, 2, 4]))
    shortest = rates[-1] * rng.randint(1, max(1, rows // rates[-1] >> (branches - 1)))
    lengths = [shortest << branch for branch in range(branches)]
    if rng.random() < 0.3:
        lengths, rates = [*lengths, rng.randint(50, rows)], [*rates, rng.randint(1, 6)]
    return DilatedPattern(lengths, rates)


def _errors(attend: Any, tensors: list[Tensor], pattern: DilatedPattern, causal: bool) -> list[float]:
    q, k, v, dout = tensors
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected, _ = oracle(exact[0], exact[1], exact[2], pattern, causal=causal)
    actual = [out, *torch.autograd.grad(out, leaves, dout)]
    wanted = [expected, *torch.autograd.grad(expected, exact, dout.double())]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(actual, wanted, strict=True)]
