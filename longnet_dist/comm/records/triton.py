# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""These Triton kernels do the work of ``comm/records/torch.py`` on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

# These integers change from call to call. Specializing on their value would only compile more kernels.
UNSPECIALIZED = ("num_places", "batch", "heads")


@triton.jit
def _pointers(k, v, places, k_strides, v_strides, num_places, heads, D: tl.constexpr, BLOCK_D: tl.constexpr,
              ROWS: tl.constexpr):  # fmt: skip
    """Return ``(index, valid, mask, key pointers, value pointers)`` of the places of this program.

    Grid: programs along axis 0 share the places, those along axis 1 the batch.
    """
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = index < num_places
    place = tl.load(places + index, mask=valid, other=0)
    row, head, element = place // heads, place % heads, tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (columns < D)[None, :]
    keys = k + element * k_strides[0] + (row * k_strides[1] + head * k_strides[2])[:, None] + columns[None, :]
    values = v + element * v_strides[0] + (row * v_strides[1] + head * v_strides[2])[:, None] + columns[None, :]
    return index, valid, mask, keys, values


@triton.jit
def _packed(packed, record, batch, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return pointers to the keys of packed records ``(records, B, 2, D)``; add ``D`` for their values."""
    return packed + tl.expand_dims((record * batch + tl.program_id(1)) * (2 * D), -1) + tl.arange(0, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def copy_kernel(packed, k, v, places, k_strides, v_strides, num_places, batch, heads, D: tl.constexpr,
                BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr):  # fmt: skip
    """Copy ``ROWS`` records of one batch element: from places to packed records with ``PACK``, else the other way."""
    index, _, mask, keys, values = _pointers(
        k, v, places, k_strides, v_strides, num_places, heads, D, BLOCK_D, ROWS
    )  # fmt: skip
    records = _packed(packed, index, batch, D, BLOCK_D)
    if PACK:
        tl.store(records, tl.load(keys, mask=mask), mask=mask)
        tl.store(records + D, tl.load(values, mask=mask), mask=mask)
    else:
        tl.store(keys, tl.load(records, mask=mask), mask=mask)
        tl.store(values, tl.load(records + D, mask=mask), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def add_kernel(packed, k, v, places, order, starts, k_strides, v_strides, num_places, batch, heads, D: tl.constexpr,
               BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr = 8):  # fmt: skip
    """Add to each of ``ROWS`` places the sum of its records.

    The order of the sum is fixed by ``order``, so that gradients repeat bit by bit; atomics would not.
    """
    index, valid, mask, keys, values = _pointers(
        k, v, places, k_strides, v_strides, num_places, heads, D, BLOCK_D, ROWS
    )  # fmt: skip
    start = tl.load(starts + index, mask=valid, other=0)
    count = tl.load(starts + index + 1, mask=valid, other=0) - start
    key_sum = tl.zeros([ROWS, BLOCK_D], packed.dtype.element_ty)
    value_sum = tl.zeros([ROWS, BLOCK_D], packed.dtype.element_ty)
    # A row of the first rank can be needed by thousands of ranks: load CHUNK records at once to hide the latency.
    for first in range(0, tl.max(count), CHUNK):
        number = first + tl.arange(0, CHUNK)[None, :]
        present = number < count[:, None]
        record = tl.load(order + start[:, None] + number, mask=present, other=0)
        records = _packed(packed, record, batch, D, BLOCK_D)
        here = present[:, :, None] & (tl.arange(0, BLOCK_D) < D)[None, None, :]
        key_sum += tl.sum(tl.load(records, mask=here, other=0.0), 1)
        value_sum += tl.sum(tl.load(records + D, mask=here, other=0.0), 1)
    key_sum += tl.load(keys, mask=mask, other=0.0).to(key_sum.dtype)
    value_sum += tl.load(values, mask=mask, other=0.0).to(value_sum.dtype)
    tl.store(keys, key_sum.to(k.dtype.element_ty), mask=mask)
    tl.store(values, value_sum.to(v.dtype.element_ty), mask=mask)
