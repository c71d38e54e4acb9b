# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
# ruff: noqa: RUF005 (Triton's compiler adds tuples, but does not unpack them)
"""Gradients of queries, keys and values rotated back, rounded, put side by side and summed, in one pass over them.

Inductor rotates, copies and sums in kernels of their own, each of which reads the gradients again. The algebra is that
of :mod:`longnet_dist.ops.join_gradients.reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longnet_dist.numerics import COMPILE, processors

WIDEST = 12288
"""Numbers of a row of the result that a program can sum."""
SUMS = 48
"""Most of them that a thread holds, of all rows that a program takes at once."""
PROGRAMS = 4
"""Of four warps, for each of the device's processors: as many as fit."""


def join_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, table: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute what ``reference.py`` does, for heads that :func:`fits` accepts."""
    gradients = (gradient.contiguous() for gradient in (dq, dk, dv))
    joined, sums = _join_gradients(*gradients, [table.contiguous() for table in table or ()], dtype)
    return joined, sums


def fits(head_dim: int, heads: int, kv_heads: int) -> bool:
    """Return whether the pieces of a row are large enough and its sums fit in registers."""
    return head_dim % 2 == 0 and _piece(head_dim, heads, kv_heads) >= 64 and (heads + 2 * kv_heads) * head_dim <= WIDEST


def _piece(head_dim: int, heads: int, kv_heads: int) -> int:
    """Return the largest power of two, at most 512, that divides the numbers of a row's queries and of its keys."""
    numbers = heads * head_dim | kv_heads * head_dim
    return min(numbers & -numbers, 512)


@torch.library.custom_op(
    "longnet_dist::join_gradients",
    mutates_args=(),
    schema="(Tensor dq, Tensor dk, Tensor dv, Tensor[] table, ScalarType dtype) -> (Tensor, Tensor)",
)
def _join_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, table: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    rows, heads, head_dim = dq.shape
    numbers, key_numbers = heads * head_dim, dk.shape[1] * head_dim
    width = numbers + 2 * key_numbers
    warps = 4 if width <= 4096 else 8
    rows_at_once = 1 << (SUMS * 32 * warps // width).bit_length() - 1
    most = PROGRAMS * processors(dq.device) * 4 // warps
    programs = min(triton.cdiv(rows, rows_at_once), most)
    joined, sums = dq.new_empty(rows, width, dtype=dtype), dq.new_empty(programs, width, dtype=torch.float32)
    _join_gradients_kernel[(programs,)](
        dq,
        dk,
        dv,
        *(table or [dq] * 2),
        joined,
        sums,
        rows,
        numbers,
        key_numbers,
        head_dim // 2,
        _piece(head_dim, heads, dk.shape[1]) // 2,
        rows_at_once,
        bool(table),
        num_warps=warps,
        **COMPILE,
    )
    return joined, sums.sum(0)


@_join_gradients.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, table: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    width = dq.shape[1] * dq.shape[2] + 2 * dk.shape[1] * dk.shape[2]
    return dq.new_empty(dq.shape[0], width, dtype=dtype), dq.new_empty(width, dtype=torch.float32)


@triton.jit
def _join_piece(
    source, table, joined, row, rows, even_sums, odd_sums, first: tl.constexpr, start: tl.constexpr,
    NUMBERS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Copy pairs of channels from pair ``first`` on of ``source`` to pair ``start`` on of ``joined``; return the sums.

    The shape of the sums, ``(rows, pairs)``, says how many rows, from ``row`` on, and pairs. A whole row has
    ``NUMBERS`` numbers in ``source`` and ``WIDTH`` in ``joined``. With ``ROTATE`` the pairs are multiplied by ``Rᵀ``.
    """
    index = row + tl.arange(0, even_sums.shape[0])[:, None]
    valid = index < rows
    index = index.to(tl.int64)
    columns = tl.arange(0, 2 * even_sums.shape[1])[None, :]
    numbers = tl.load(source + index * NUMBERS + 2 * first + columns, mask=valid, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(numbers, (even_sums.shape[0], even_sums.shape[1], 2)))
    if ROTATE:
        factors = tl.load(table + index * 2 * HALF + (2 * first + columns) % (2 * HALF), mask=valid, other=0.0)
        # R = [[c, -s], [s, c]] of a pair, so Rᵀ (x, y) = (c x + s y, c y - s x).
        c, s = tl.split(tl.reshape(factors, (even_sums.shape[0], even_sums.shape[1], 2)))
        even, odd = even * c + odd * s, odd * c - even * s
    numbers = tl.reshape(tl.join(even, odd), (even_sums.shape[0], 2 * even_sums.shape[1]))
    tl.store(joined + index * WIDTH + 2 * start + columns, numbers, mask=valid)  # rounds to the result's dtype, once
    return even_sums + even, odd_sums + odd


@triton.jit
def _join_gradients_kernel(
    dq, dk, dv, query_table, key_table, joined, sums, rows,
    QUERY: tl.constexpr, KEY: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """Join ``ROWS`` rows from ``ROWS·p``, ``ROWS·(p + P)``, … in program ``p`` of ``P``; sum them in ``sums[p]``.

    ``dq (rows, QUERY)``, ``dk, dv (rows, KEY)``, tables ``(rows, HALF, 2)``, ``joined (rows, QUERY + 2·KEY)``.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    WIDTH: tl.constexpr = QUERY + 2 * KEY
    QUERIES: tl.constexpr = QUERY // 2 // PAIRS
    KEYS: tl.constexpr = KEY // 2 // PAIRS
    evens, odds = (), ()
    for _ in tl.static_range(QUERIES + 2 * KEYS):
        evens, odds = evens + (tl.zeros((ROWS, PAIRS), tl.float32),), odds + (tl.zeros((ROWS, PAIRS), tl.float32),)
    for row in tl.range(program * ROWS, rows, programs * ROWS, num_stages=3):
        new_evens, new_odds = (), ()
        for i in tl.static_range(QUERIES):
            even, odd = _join_piece(
                dq, query_table, joined, row, rows, evens[i], odds[i],
                i * PAIRS, i * PAIRS, QUERY, WIDTH, HALF, ROTATE,
            )  # fmt: skip
            new_evens, new_odds = new_evens + (even,), new_odds + (odd,)
        for i in tl.static_range(KEYS):
            even, odd = _join_piece(
                dk, key_table, joined, row, rows, evens[QUERIES + i], odds[QUERIES + i],
                i * PAIRS, QUERY // 2 + i * PAIRS, KEY, WIDTH, HALF, ROTATE,
            )  # fmt: skip
            new_evens, new_odds = new_evens + (even,), new_odds + (odd,)
        for i in tl.static_range(KEYS):
            even, odd = _join_piece(
                dv, key_table, joined, row, rows, evens[QUERIES + KEYS + i], odds[QUERIES + KEYS + i],
                i * PAIRS, (QUERY + KEY) // 2 + i * PAIRS, KEY, WIDTH, HALF, False,
            )  # fmt: skip
            new_evens, new_odds = new_evens + (even,), new_odds + (odd,)
        evens, odds = new_evens, new_odds
    # db = Σ g, even and odd channels apart; the caller adds up the programs.
    start = sums + program.to(tl.int64) * WIDTH
    for i in tl.static_range(QUERIES + 2 * KEYS):
        place = 2 * (i * PAIRS + tl.arange(0, PAIRS))
        tl.store(start + place, tl.sum(evens[i], 0))
        tl.store(start + place + 1, tl.sum(odds[i], 0))
