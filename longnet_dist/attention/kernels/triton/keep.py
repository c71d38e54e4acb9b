# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Rotation of the present queries and keys of texts that are decoded, whose keys and values are kept in their slots.

A step has few numbers here. In torch they pass through some twenty kernels, each of which takes longer to start than to
run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longnet_dist.numerics import COMPILE, block_dim


def rotate_and_keep(
    q: Tensor, k: Tensor, v: Tensor, records: Tensor, slots: Tensor, tables: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Return the rotated queries, contiguous, as ``q (B, 1, H, D)``; keep rotated keys and values in ``records``.

    The rotation is :func:`~longnet_dist.attention.positions.rotate`, in float32; queries, keys and values are rounded
    once.

    Args:
        q: ``(B, 1, H, D)``, with the last dim contiguous.
        k, v: ``(B, 1, Hkv, D)``, with the last dim contiguous.
        records: ``(2, B, Hkv, slots, D)``, keys and values, with the last dim contiguous.
        slots: ``(branches, B, Hkv)`` int64, contiguous, where they are kept; a slot may come several times.
        tables: of queries and keys, ``(B, 1, D/2, 2)`` float32, contiguous; None: nothing is rotated.
    """
    texts, _, heads, dim = q.shape
    kv_heads = k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _rotate_and_keep_kernel[(texts * kv_heads,)](
        q, k, v, *(tables or (q, q)), slots, records, out,
        q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2), *records.stride()[:4],
        len(slots), kv_heads, heads // kv_heads, dim, block_dim(dim), tables is not None, num_warps=1, **COMPILE,
    )  # fmt: skip
    return out


@triton.jit
def _load_rotated(source, table, text, DIM: tl.constexpr, PADDED: tl.constexpr, ROTATE: tl.constexpr):
    """Return ``(PADDED,)`` channels of a head in float32, times the factors of the text."""
    channels = tl.arange(0, PADDED)
    x = tl.load(source + channels, mask=channels < DIM, other=0.0).to(tl.float32)
    if ROTATE:
        # Channels 2i and 2i+1 are a complex number: (a + ib)(c + is) = (a c - b s) + i(b c + a s).
        other = tl.load(source + (channels ^ 1), mask=channels < DIM, other=0.0).to(tl.float32)
        factors = table + text * DIM + (channels & -2)
        cos = tl.load(factors, mask=channels < DIM, other=0.0)
        sin = tl.load(factors + 1, mask=channels < DIM, other=0.0)
        x = x * cos + other * tl.where(channels % 2 == 0, -sin, sin)
    return x


@triton.jit
def _rotate_and_keep_kernel(
    q, k, v, query_table, key_table, slots, records, out,
    q_text_stride, q_head_stride, k_text_stride, k_head_stride, v_text_stride, v_head_stride,
    kind_stride, text_stride, head_stride, slot_stride,
    BRANCHES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """Rotate and keep row ``program_id(0)``, a text and one of its ``HEADS`` key/value heads, and its queries."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    text, head = row // HEADS, row % HEADS
    channels = tl.arange(0, PADDED)
    key = _load_rotated(k + text * k_text_stride + head * k_head_stride, key_table, text, DIM, PADDED, ROTATE)
    value = _load_rotated(v + text * v_text_stride + head * v_head_stride, key_table, text, DIM, PADDED, False)
    place = records + text * text_stride + head * head_stride + channels
    for branch in tl.static_range(BRANCHES):
        slot = tl.load(slots + branch * rows + row)
        tl.store(place + slot * slot_stride, key, mask=channels < DIM)
        tl.store(place + slot * slot_stride + kind_stride, value, mask=channels < DIM)
    for g in tl.static_range(GROUP):
        number = head * GROUP + g
        query = _load_rotated(q + text * q_text_stride + number * q_head_stride, query_table, text, DIM, PADDED, ROTATE)
        tl.store(out + (row * GROUP + g) * DIM + channels, query, mask=channels < DIM)
