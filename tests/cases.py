"""Random problems of dilated attention, the same on every rank for the same seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import Shards


def seeds(default: int, all_of_them: int) -> list:
    """Seeds of random cases, of which those from ``default`` on run with the marker ``long`` alone."""
    return [*range(default), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(default, all_of_them))]


@dataclass(frozen=True)
class Case:
    """Inputs in float64, and the slices of ``shards.num_ranks`` ranks."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    pattern: DilatedPattern
    causal: bool
    shards: Shards


def random_case(seed: int, ranks: int = 1) -> Case:
    """A small problem: ragged N, any branches and shifts, w > N, r > w, grouped heads, both head offsets and masks."""
    rng = random.Random(f"{seed} {ranks}")
    rows = rng.randint(1, 70 // ranks)
    total = (ranks - 1) * rows + rng.randint(1, rows)
    batch, kv_heads, group, dim = rng.randint(1, 3), rng.randint(1, 5), rng.choice([1, 1, 2, 3]), rng.choice([2, 4, 8])
    branches = rng.randint(1, 4)
    lengths = [rng.randint(1, total + 20) for _ in range(branches)]
    rates, offsets = [rng.randint(1, 9) for _ in range(branches)], rng.choice(["modulo", "blocked"])
    causal = rng.random() < 0.5
    shift = [rng.choice([0, rng.randrange(width)]) for width in lengths] if rng.random() < 0.4 else None
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int) -> Tensor:
        return torch.randn(batch, total, heads, dim, dtype=torch.float64, generator=generator)

    return Case(
        normal(kv_heads * group),
        normal(kv_heads),
        normal(kv_heads),
        normal(kv_heads * group),
        DilatedPattern(lengths, rates, offsets, shift),
        causal,
        Shards(total, rows, ranks),
    )
