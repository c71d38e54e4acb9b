# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
# ruff: noqa: RUF005 (Triton's compiler adds tuples, but does not unpack them)
r"""Attention of one query a head to many cached keys, which are split over the processors of a GPU.

One text has few heads, fewer than a GPU has processors, and each of them has thousands of keys. So the keys of a head
are split, every program computes the softmax of its part, and a second kernel merges the parts by their denominators:

.. math::
    o = \sum_s e^{\ell_s - \ell}\, o_s, \qquad \ell = \log \sum_s e^{\ell_s} .
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longnet_dist.numerics import COMPILE, block_dim, processors

BLOCK = 64
"""Keys that a program reads at once."""
MOST_SPLITS = 128
PROGRAMS = 4
"""For each of the device's processors."""
LOG2E = 1.4426950408889634


def attend_to_slots(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, nothing: Tensor) -> Tensor:
    """Return ``(B, Hkv, G, D)``, what queries ``q (B, Hkv, G, D)`` attend to.

    Args:
        q: the queries of the ``G`` heads that share a key/value head.
        keys, values: ``(B, Hkv, slots, D)``, alike in strides, with the last dim contiguous.
        seen: ``(B, Hkv, slots)`` bool, contiguous, the slots that count.
        nothing: ``(B, Hkv, 1)`` bool, contiguous, where the result is 0.
    """
    (texts, heads, group, dim), slots = q.shape, keys.shape[2]
    rows = texts * heads
    splits = max(1, min(MOST_SPLITS, PROGRAMS * processors(q.device) // rows, -(-slots // BLOCK)))
    chunk = -(-slots // splits // BLOCK) * BLOCK
    parts = q.new_empty(rows, group, splits, dim, dtype=torch.float32)
    lses = q.new_empty(rows, group, splits, dtype=torch.float32)
    padded = block_dim(dim)
    _parts_kernel[(rows, splits)](
        q.contiguous(), keys, values, seen, parts, lses, dim**-0.5 * LOG2E, slots, chunk, heads,
        keys.stride(0), keys.stride(1), keys.stride(2), splits, group, dim, padded, BLOCK, num_warps=4, **COMPILE,
    )  # fmt: skip
    out = q.new_empty(q.shape)
    _merge_kernel[(rows * group,)](
        parts, lses, nothing, out, splits, group, dim, padded, triton.next_power_of_2(splits), num_warps=4, **COMPILE
    )
    return out


@triton.jit
def _parts_kernel(
    q, keys, values, seen, parts, lses, scale, slots, chunk, heads, text_stride, head_stride, slot_stride,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute part ``program_id(1)`` of the keys of row ``program_id(0)``, a text and a key/value head.

    ``parts (rows, GROUP, SPLITS, DIM)``; ``lses (rows, GROUP, SPLITS)``, to the base 2.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channels = tl.arange(0, PADDED)
    real = channels < DIM
    start = (row // heads) * text_stride + (row % heads) * head_stride
    queries, tops, sums, accumulated = (), (), (), ()
    for g in tl.static_range(GROUP):
        query = tl.load(q + (row * GROUP + g) * DIM + channels, mask=real, other=0.0).to(tl.float32) * scale
        queries, tops = queries + (query,), tops + (tl.full((), float("-inf"), tl.float32),)
        sums, accumulated = sums + (tl.zeros((), tl.float32),), accumulated + (tl.zeros((PADDED,), tl.float32),)
    first = split * chunk
    for begin in tl.range(first, tl.minimum(first + chunk, slots), BLOCK):
        place = begin + tl.arange(0, BLOCK)
        visible = tl.load(seen + row * slots + place, mask=place < slots, other=0) != 0
        at = start + place.to(tl.int64)[:, None] * slot_stride + channels[None, :]
        wanted = visible[:, None] & real[None, :]
        key = tl.load(keys + at, mask=wanted, other=0.0).to(tl.float32)
        value = tl.load(values + at, mask=wanted, other=0.0).to(tl.float32)
        new_tops, new_sums, new_accumulated = (), (), ()
        for g in tl.static_range(GROUP):
            score = tl.where(visible, tl.sum(key * queries[g][None, :], 1), float("-inf"))
            top = tl.maximum(tops[g], tl.max(score, 0))
            # Where nothing was visible so far the maximum is -inf, and 0 stands in for it.
            safe = tl.where(top == float("-inf"), 0.0, top)
            weight, old = tl.exp2(score - safe), tl.exp2(tops[g] - safe)
            new_tops, new_sums = new_tops + (top,), new_sums + (sums[g] * old + tl.sum(weight, 0),)
            new_accumulated = new_accumulated + (accumulated[g] * old + tl.sum(weight[:, None] * value, 0),)
        tops, sums, accumulated = new_tops, new_sums, new_accumulated
    for g in tl.static_range(GROUP):
        place = (row * GROUP + g) * SPLITS + split
        total = tl.where(sums[g] == 0.0, 1.0, sums[g])
        tl.store(lses + place, tl.where(sums[g] == 0.0, float("-inf"), tops[g] + tl.log2(total)))
        tl.store(parts + place * DIM + channels, accumulated[g] / total, mask=real)


@triton.jit
def _merge_kernel(
    parts, lses, nothing, out,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Merge the parts of query ``program_id(0)``."""
    query = tl.program_id(0).to(tl.int64)
    split, channels = tl.arange(0, WIDTH), tl.arange(0, PADDED)
    lse = tl.load(lses + query * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    at = (query * SPLITS + split.to(tl.int64))[:, None] * DIM + channels[None, :]
    inside = (split < SPLITS)[:, None] & (channels < DIM)[None, :]
    part = tl.load(parts + at, mask=inside, other=0.0)
    total = tl.sum(weight, 0)
    merged = tl.sum(weight[:, None] * part, 0) / tl.where(total == 0.0, 1.0, total)
    empty = tl.load(nothing + query // GROUP) != 0
    tl.store(out + query * DIM + channels, tl.where(empty, 0.0, merged), mask=channels < DIM)
