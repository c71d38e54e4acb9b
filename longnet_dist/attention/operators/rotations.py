"""The rotations of queries and keys as one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longnet_dist.attention.operators.arguments import GRID_SCHEMA, Edges, cu_seqlens_of, grid_of, pattern_of
from longnet_dist.attention.packing import documents_of_model
from longnet_dist.attention.positions import Positions, RotaryTable
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.position_encodings import POSITION_ENCODINGS
from longnet_dist.numerics import wide_dtype


def operator_rotations(
    positions: Positions, pattern: DilatedPattern, like: Tensor, batch: int, rows: int, cu_seqlens: Any
) -> RotaryTable:
    """Return the rotations of ``batch · rows`` rows, for queries and keys like ``like (…, D)``."""
    tables = torch.ops.longnet_dist.rotations(
        like,
        batch,
        rows,
        positions.name,
        positions.theta,
        positions.xpos_base,
        *Edges.of(cu_seqlens),
        *grid_of(pattern),
    )
    return RotaryTable(tables[0], tables[-1])


_ROTATIONS = "Tensor like, SymInt batch, SymInt rows, str name, float theta, int? xpos_base"


@torch.library.custom_op("longnet_dist::rotations", mutates_args=(), schema=f"({_ROTATIONS}, {GRID_SCHEMA}) -> Tensor")
def _rotations(
    like: Tensor, batch: int, rows: int, name: str, theta: float, xpos_base: int | None, *given: Any
) -> Tensor:
    edges, integers, counts, lengths, rates, rule, shift, turn = given
    pattern = pattern_of(tuple(lengths), tuple(rates), rule, tuple(shift), turn)
    documents, as_one = documents_of_model(cu_seqlens_of(edges, integers, counts), batch, rows, None)
    batch, rows = (1, batch * rows) if as_one else (batch, rows)
    query, key = Positions(theta, xpos_base, name).table(
        pattern, 0, rows, rows, like.shape[-1], like.dtype, like.device, batch, documents
    )
    return torch.stack([query] if POSITION_ENCODINGS[name].num_tables() == 1 else [query, key])


@_rotations.register_fake
def _(like: Tensor, batch: int, rows: int, name: str, theta: float, xpos_base: int | None, *given: Any) -> Tensor:
    tables, dim = POSITION_ENCODINGS[name].num_tables(), like.shape[-1]
    return like.new_empty(tables, batch * rows, 1, dim // 2, 2, dtype=wide_dtype(like.dtype))
