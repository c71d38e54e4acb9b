r"""Rotary positions (RoPE) and extrapolatable positions (xPos), right at row :math:`2^{30}` and beyond.

Row :math:`n` rotates channel pair :math:`i` of queries and keys by :math:`n\theta_i`, :math:`\theta_i = \theta^{-2i/D}`
(RoPE, arXiv 2104.09864). xPos (arXiv 2212.10554) also scales queries by :math:`\zeta_i^{n/\mathrm{base}}` and keys by
:math:`\zeta_i^{-n/\mathrm{base}}`, :math:`\zeta_i = (2i/D + 0.4) / 1.4`, so that scores decay with the distance. Only
differences of rows matter to a score, and neither product survives floating point at large :math:`n`, so

* angles are whole numbers of :math:`2^{-64}` turns: ``n`` times such an integer, in 64-bit arithmetic that wraps, is
  the angle without its full turns, exact for every ``n``;
* xPos counts rows from the centre of a *span* that holds every pair of rows that can attend to each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longnet_dist.errors import ConfigError
from longnet_dist.geometry.documents import Documents
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.numerics import wide_dtype

_TWO_PI = Decimal("6.28318530717958647692528676655900576839433879875021")


_TABLE_ROWS = 65536
"""Rows of the tables that are computed at once: on the way there an angle takes 60 bytes, in the tables 8 to 16."""


class RotaryTable(NamedTuple):
    """Hold the cosine and sine of each row and pair of channels, times the pair's scale: for queries, for keys.

    Both are ``(n, 1, D/2, 2)``, float32 or float64. With RoPE they are one tensor.
    """

    query: Tensor
    key: Tensor

    def rows(self, rows: slice) -> RotaryTable:
        """Return the tables of some of the rows."""
        return RotaryTable(self.query[rows], self.key[rows])

    def transposed(self) -> RotaryTable:
        """Return the transposed linear maps, which gradients of queries and keys take on their way back.

        A pair of channels is a complex number, and its factor ``c·exp(iφ)`` has the transpose ``c·exp(-iφ)``. For RoPE,
        where ``c = 1``, that is the opposite rotation.
        """
        signs = 1 - 2 * torch.arange(2, device=self.query.device)
        return RotaryTable(self.query * signs, self.key * signs)


@dataclass(eq=False)
class Positions:
    """Place the queries and keys of one head dim at global rows; the layers of a model share one object and its cache.

    Attributes:
        theta: base of the wavelengths of the rotation, at least 1.
        xpos_base: rows over which xPos scales by ``ζ``; None for RoPE.
    """

    theta: float = 10000.0
    xpos_base: int | None = None
    _cached: tuple[tuple[object, ...], RotaryTable] | None = field(default=None, init=False, repr=False)

    def __call__(
        self, q: Tensor, k: Tensor, pattern: DilatedPattern, start: int, total_rows: int
    ) -> tuple[Tensor, Tensor]:
        """Place ``q (B, n, H, D)`` and ``k (B, n, Hkv, D)`` at global rows ``start … start+n-1``; their dtype is kept.

        Args:
            pattern: the pattern in which they will attend.
            start: global row of their first row.
            total_rows: ``N``.

        Raises:
            ConfigError: ``D`` is odd, or xPos leaves the range of the dtype (see :meth:`check`).
        """
        _, rows, _, head_dim = q.shape
        return rotate(q, k, self.table(pattern, start, rows, total_rows, head_dim, q.dtype, q.device))

    def table(
        self,
        pattern: DilatedPattern,
        start: int,
        rows: int,
        total_rows: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        batch: int = 1,
        documents: Documents | None = None,
    ) -> RotaryTable:
        """Return tables for rows ``start … start+rows-1`` of ``batch`` sequences, one behind the other.

        They are float32, or float64 for queries and keys of that ``dtype``.

        Raises:
            ConfigError: as :meth:`__call__`.
        """
        longest = total_rows if documents is None else documents.longest
        self.check(pattern, longest, head_dim, dtype)
        span, wide = attending_span(pattern, longest), wide_dtype(dtype)
        key = (start, rows, span, head_dim, wide, device, batch, documents)
        if self._cached is None or self._cached[0] != key:
            self._cached = None  # so that the old tables' memory is free for the new
            with torch.inference_mode(False):  # the tables of a validation step may serve a training step
                self._cached = key, self._tables(start, rows, span, head_dim, wide, device, batch, documents)
        return self._cached[1]

    def check(self, pattern: DilatedPattern, total_rows: int, head_dim: int, dtype: torch.dtype) -> None:
        """Raise ConfigError if these positions cannot serve ``total_rows`` rows of ``head_dim`` channels in ``dtype``.

        xPos scales by at most ``exp(span/2 · ln(3.5) / base)``. Scaled queries meet scaled keys, so this must stay
        under the square root of the largest number of the dtype: the paper's 32,768 rows at base 512 do in float32 and
        bfloat16.
        """
        if head_dim < 2 or head_dim % 2:
            raise ConfigError(f"positions rotate pairs of channels, but head_dim is {head_dim}; use an even head_dim")
        if self.xpos_base is None:
            return
        span = attending_span(pattern, total_rows)
        exponent = span / 2 * -math.log(0.4 / 1.4)
        largest = math.log(torch.finfo(dtype).max) / 2
        if exponent / self.xpos_base > largest:
            raise ConfigError(
                f"xpos with base {self.xpos_base} leaves the range of {dtype} over the {span} rows in which {pattern} "
                f"lets rows attend; use xpos_base={math.ceil(exponent / largest)} or more, or rope"
            )

    def _tables(
        self,
        start: int,
        rows: int,
        span: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
        documents: Documents | None,
    ) -> RotaryTable:
        turns = torch.tensor(_turns(self.theta, head_dim), device=device)
        zeta = (torch.arange(0, head_dim, 2, device=device).double() / head_dim + 0.4) / 1.4
        number = 1 if self.xpos_base is None else 2
        tables = torch.empty(number, rows, 1, head_dim // 2, 2, dtype=dtype, device=device)
        for first in range(0, rows, _TABLE_ROWS):
            part = tables[:, first : first + _TABLE_ROWS]
            n, spans = _indices(start + first, part.shape[1], span, device, documents)
            # The int64 product wraps at 2^64, which is a full turn: what is left is n θ_i without its full turns.
            angle = (n * turns).double() * (2 * math.pi / 2**64)
            factors = torch.stack([angle.cos(), angle.sin()], -1)
            if self.xpos_base is None:
                part[0] = factors
            else:
                # Queries take ζ^(m/base) and keys ζ^(-m/base), with m counted from the centre of the span. A score sees
                # only ζ^((m - m')/base), in which the centre cancels.
                scale = zeta.pow((n % spans - spans / 2) / self.xpos_base).unsqueeze(-1)
                part[0], part[1] = factors * scale, factors / scale
        if batch > 1:
            tables = tables.repeat(1, batch, 1, 1, 1)
        return RotaryTable(tables[0], tables[-1])


def _indices(
    start: int, rows: int, span: int, device: torch.device, documents: Documents | None
) -> tuple[Tensor, Tensor | int]:
    """Return the index ``(rows, 1, 1)`` of each row in its document, and the span over which xPos counts there.

    Padding counts from row 0 of the sequence, which nobody sees.
    """
    n = torch.arange(start, start + rows, device=device)
    if documents is None:
        return n.view(-1, 1, 1), span
    number = np.searchsorted(documents.array_starts, np.arange(start, start + rows), side="right") - 1
    first = np.where(number < 0, 0, documents.array_starts[number])
    length = np.where(number < 0, 1, (documents.array_stops - documents.array_starts)[number])
    n = n - torch.from_numpy(first).to(device)
    return n.view(-1, 1, 1), torch.from_numpy(np.minimum(length, span)).to(device).view(-1, 1, 1)


def attending_span(pattern: DilatedPattern, total_rows: int) -> int:
    """Return a ``span``, at most N, such that rows which attend to each other lie in one ``[s·span, (s+1)·span)``.

    Segments of length ``w`` never cross a multiple of a multiple of ``w``.
    """
    return min(math.lcm(*pattern.segment_lengths), total_rows)


@lru_cache(maxsize=8)
def _turns(theta: float, head_dim: int) -> tuple[int, ...]:
    """Return the angle between neighbouring rows for each pair of channels, in units of 2^-64 turns, rounded once."""
    with localcontext() as context:
        context.prec = 40
        base = Decimal(theta)
        return tuple(round(base ** (Decimal(-2 * i) / head_dim) / _TWO_PI * 2**64) for i in range(head_dim // 2))


def rotate(q: Tensor, k: Tensor, table: RotaryTable) -> tuple[Tensor, Tensor]:
    """Rotate ``q (…, n, H, D)`` and ``k (…, n, Hkv, D)`` by their rows' factors; their dtype is kept."""
    return _rotated(q, table.query), _rotated(k, table.key)


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    """Multiply each pair of channels ``(2i, 2i+1)``, a complex number, by its factor, in the dtype of the table.

    There are no branches, since a compiler would compute both for every channel.
    """
    pairs, cos, sin = torch.unflatten(x.to(table.dtype), -1, (-1, 2)), table[..., :1], table[..., 1:]
    signs = 2 * torch.arange(2, device=x.device) - 1
    # (a + ib)(c + is) = (a c - b s) + i(b c + a s): the pair times cos, and the flipped pair times (-sin, sin).
    return (pairs * cos + pairs.flip(-1) * signs * sin).flatten(-2).to(x.dtype)
