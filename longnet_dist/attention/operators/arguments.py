"""Patterns and document edges as plain numbers, which operators of torch can take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet_dist.caches import bounded_cache
from longnet_dist.geometry.pattern import DilatedPattern

GRID_SCHEMA = (
    "Tensor? edges, SymInt[] integers, int[] counts, int[] lengths, int[] rates, str rule, int[] shift, int turn"
)
"""The arguments that :class:`Edges` and :func:`grid_of` give."""


class Edges(NamedTuple):
    """Hold ``cu_seqlens`` as arguments of an operator: a tensor on the host, or integers and the length of each list.

    Integers in a graph may be symbolic, so that other documents need no other graph.
    """

    tensor: Tensor | None
    integers: list[int]
    counts: list[int]

    @classmethod
    def of(cls, cu_seqlens: Any) -> Edges:
        """Take apart the ``cu_seqlens`` of a call."""
        if cu_seqlens is None:
            return cls(None, [], [])
        if isinstance(cu_seqlens, Tensor):
            return cls(cu_seqlens, [], [])
        if not isinstance(cu_seqlens, list | tuple):  # an array
            return cls(torch.as_tensor(cu_seqlens), [], [])
        if not cu_seqlens:  # which the call refuses
            return cls(None, [], [0])
        if isinstance(cu_seqlens[0], int | torch.SymInt):
            return cls(None, list(cu_seqlens), [])
        lists = [list(x) for x in cu_seqlens]
        return cls(None, [edge for edges in lists for edge in edges], [len(edges) for edges in lists])


def cu_seqlens_of(tensor: Tensor | None, integers: Sequence[int], counts: Sequence[int]) -> Any:
    """Return the ``cu_seqlens`` that :class:`Edges` holds."""
    if tensor is not None or not (integers or counts):
        return tensor
    if not counts:
        return list(integers)
    stops = [sum(counts[: number + 1]) for number in range(len(counts))]
    return [list(integers[stop - count : stop]) for stop, count in zip(stops, counts, strict=True)]


def grid_of(pattern: DilatedPattern) -> tuple[list[int], list[int], str, list[int], int]:
    """Return a pattern as the last arguments of ``GRID_SCHEMA``."""
    return [*pattern.segment_lengths], [*pattern.dilation_rates], pattern.head_offsets, [*pattern.shift], pattern.turn


@bounded_cache(maxsize=256)
def pattern_of(
    lengths: tuple[int, ...], rates: tuple[int, ...], rule: str, shift: tuple[int, ...], turn: int
) -> DilatedPattern:
    """Return the pattern of which :func:`grid_of` gives these."""
    return DilatedPattern(lengths, rates, rule, shift).of_layer(turn, offsets=True)
