# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
r"""Attention of one query a head to many cached keys, which are split over the processors of a GPU.

One text has few heads, fewer than a GPU has processors, and each of them has thousands of keys. So the keys of a head
are split, every program computes the softmax of its part, and a second kernel merges the parts by their denominators:

.. math::
    o = \sum_s e^{\ell_s - \ell}\, o_s, \qquad \ell = \log \sum_s e^{\ell_s} .

Keys are read in blocks. Only blocks with a key that is seen are read, from a list (:func:`visible_blocks`), of which
each program gets an equal share. The keys and values of a block are loaded without waiting for its mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from longnet_dist.numerics import COMPILE, block_dim, processors

# What the speed depends on: benchmarks/decode_kernels.py measures other values.
BLOCK = 64
"""Most keys of a block."""
NUMBERS = 8192
"""Most sums of a program, ``block · D``, where one query of a key/value head makes no matmul."""
WARPS = 4
STAGES = 3
"""Blocks whose loads are under way at once."""
PROGRAMS = 4
"""For each of the device's processors, if there are few texts."""
MOST_BLOCKS = 16
"""Of a program, so that many texts make many programs, whose ends fall together."""
MOST_SPLITS = 128
LOG2E = 1.4426950408889634


class VisibleBlocks(NamedTuple):
    """List the blocks of keys of which a head sees some.

    Attributes:
        size: keys of a block.
        numbers: ``(B, Hkv, blocks)`` int32, contiguous, the numbers of such blocks, in order, then those of the others.
        counts: ``(B, Hkv)`` int32, contiguous, the number of such blocks.
    """

    size: int
    numbers: Tensor
    counts: Tensor


def block_size(group: int, dim: int) -> int:
    """Return the keys of a block for ``group`` queries of ``dim`` channels that share a key/value head."""
    return BLOCK if group > 1 else max(16, min(BLOCK, 1 << (NUMBERS // block_dim(dim)).bit_length() - 1))


def visible_blocks(seen: Tensor, size: int) -> VisibleBlocks:
    """Return the blocks of ``size`` slots of which ``seen (B, Hkv, slots)``, bool, has some."""
    padded = F.pad(seen, (0, -seen.shape[2] % size), value=False)
    visible = torch.unflatten(padded, 2, (-1, size)).any(-1).to(torch.int32)
    numbers = visible.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return VisibleBlocks(size, numbers, visible.sum(-1, dtype=torch.int32))


def attend_to_slots(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, nothing: Tensor, blocks: VisibleBlocks
) -> Tensor:
    """Return ``(B, Hkv, G, D)``, what queries ``q (B, Hkv, G, D)`` attend to.

    Keys and values that are not seen may be anything, NaN too.

    Args:
        q: the queries of the ``G`` heads that share a key/value head.
        keys, values: ``(B, Hkv, slots, D)``, alike in strides, with the last dim contiguous.
        seen: ``(B, Hkv, slots)`` bool, contiguous, the slots that count.
        nothing: ``(B, Hkv, 1)`` bool, contiguous, where the result is 0.
        blocks: those of ``seen``, of :func:`block_size` slots.
    """
    (texts, heads, group, dim), slots = q.shape, keys.shape[2]
    rows, most = texts * heads, blocks.numbers.shape[2]
    splits = max(PROGRAMS * processors(q.device) // rows, triton.cdiv(most, MOST_BLOCKS))
    splits = max(1, min(splits, most, MOST_SPLITS))
    parts = q.new_empty(rows, group, splits, dim, dtype=torch.float32)
    lses = q.new_empty(rows, group, splits, dtype=torch.float32)
    padded = block_dim(dim)
    kernel, own = (
        (_matmul_parts_kernel, {"GROUP": group, "ROWS": block_dim(group)}) if group > 1 else (_parts_kernel, {})
    )
    kernel[(rows, splits)](
        q.contiguous(), keys, values, seen, blocks.numbers, blocks.counts, parts, lses, dim**-0.5 * LOG2E, slots, most,
        heads, keys.stride(0), keys.stride(1), keys.stride(2), splits, dim, padded, blocks.size, STAGES,
        num_warps=WARPS, **own, **COMPILE,
    )  # fmt: skip
    out = q.new_empty(q.shape)
    _merge_kernel[(rows * group,)](
        parts, lses, nothing, out, splits, group, dim, padded, triton.next_power_of_2(splits), num_warps=4, **COMPILE
    )
    return out


@triton.jit
def _share(counts, row, split, SPLITS: tl.constexpr):
    """Return the first block of part ``split`` in the list of ``row``, and the one behind its last."""
    count = tl.load(counts + row)
    return split * count // SPLITS, (split + 1) * count // SPLITS


@triton.jit
def _load_block(
    keys, values, seen, number, row, start, slots, slot_stride, DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Return keys and values ``(BLOCK, PADDED)`` of a block, and which of them count; values of others are 0."""
    place = number * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, PADDED)
    visible = tl.load(seen + row * slots + place, mask=place < slots, other=0) != 0
    # The last block may end behind the slots. There it reads the last slot again, so that no load needs a mask.
    at = start + tl.minimum(place, slots - 1).to(tl.int64)[:, None] * slot_stride + channels[None, :]
    if PADDED == DIM:
        key, value = tl.load(keys + at), tl.load(values + at)
    else:
        real = (channels < DIM)[None, :]
        key, value = tl.load(keys + at, mask=real, other=0.0), tl.load(values + at, mask=real, other=0.0)
    return key, tl.where(visible[:, None], value, 0.0), visible


@triton.jit
def _parts_kernel(
    q, keys, values, seen, numbers, counts, parts, lses, scale, slots, most, heads,
    text_stride, head_stride, slot_stride, SPLITS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute part ``program_id(1)`` of the keys of row ``program_id(0)``, a text and a head.

    ``numbers (rows, most)``, ``counts (rows,)``; ``parts (rows, SPLITS, DIM)``; ``lses (rows, SPLITS)``, to the base 2.
    Each place of a block has a softmax of its own until the end, so that threads need not meet.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channels = tl.arange(0, PADDED)
    start = (row // heads) * text_stride + (row % heads) * head_stride
    query = tl.load(q + row * DIM + channels, mask=channels < DIM, other=0.0).to(tl.float32) * scale
    tops, sums = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    accumulated = tl.zeros((BLOCK, PADDED), tl.float32)
    first, stop = _share(counts, row, split, SPLITS)
    for i in tl.range(first, stop, num_stages=STAGES):
        number = tl.load(numbers + row * most + i)
        key, value, visible = _load_block(
            keys, values, seen, number, row, start, slots, slot_stride, DIM, PADDED, BLOCK
        )
        score = tl.where(visible, tl.sum(key.to(tl.float32) * query[None, :], 1), float("-inf"))
        top = tl.maximum(tops, score)
        # Where nothing was visible so far the maximum is -inf, and 0 stands in for it.
        safe = tl.where(top == float("-inf"), 0.0, top)
        weight, old = tl.exp2(score - safe), tl.exp2(tops - safe)
        sums = sums * old + weight
        accumulated = accumulated * old[:, None] + weight[:, None] * value.to(tl.float32)
        tops = top
    top = tl.max(tops, 0)
    weight = tl.exp2(tops - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight * sums, 0)
    place = row * SPLITS + split
    tl.store(lses + place, tl.where(total == 0.0, float("-inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total))))
    part = tl.sum(weight[:, None] * accumulated, 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(parts + place * DIM + channels, part, mask=channels < DIM)


@triton.jit
def _matmul_parts_kernel(
    q, keys, values, seen, numbers, counts, parts, lses, scale, slots, most, heads,
    text_stride, head_stride, slot_stride, SPLITS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute what ``_parts_kernel`` does for the ``GROUP`` queries of a key/value head: the first rows of a matmul.

    ``parts (rows, GROUP, SPLITS, DIM)``; ``lses (rows, GROUP, SPLITS)``.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    member, channels = tl.arange(0, ROWS), tl.arange(0, PADDED)
    real = (member < GROUP)[:, None] & (channels < DIM)[None, :]
    start = (row // heads) * text_stride + (row % heads) * head_stride
    queries = tl.load(q + (row * GROUP + member[:, None]) * DIM + channels[None, :], mask=real, other=0.0)
    tops, sums = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    accumulated = tl.zeros((ROWS, PADDED), tl.float32)
    first, stop = _share(counts, row, split, SPLITS)
    for i in tl.range(first, stop, num_stages=STAGES):
        number = tl.load(numbers + row * most + i)
        key, value, visible = _load_block(
            keys, values, seen, number, row, start, slots, slot_stride, DIM, PADDED, BLOCK
        )
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        top = tl.maximum(tops, tl.max(scores, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        weight, old = tl.exp2(scores - safe[:, None]), tl.exp2(tops - safe)
        sums = sums * old + tl.sum(weight, 1)
        accumulated = accumulated * old[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        tops = top
    total = tl.where(sums == 0.0, 1.0, sums)
    place = (row * GROUP + member) * SPLITS + split
    tl.store(lses + place, tl.where(sums == 0.0, float("-inf"), tops + tl.log2(total)), mask=member < GROUP)
    tl.store(parts + place[:, None] * DIM + channels[None, :], accumulated / total[:, None], mask=real)


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
