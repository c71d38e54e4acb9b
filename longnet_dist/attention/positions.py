r"""Positions of queries and keys, right at row :math:`2^{30}` and beyond.

Row :math:`n` multiplies channel pair :math:`i`, a complex number, by the factor of its encoding
(``geometry/position_encodings``): a rotation, and for some encodings a scale that lets scores decay with the distance.
Only differences of rows matter to a score, and neither factor survives floating point at large :math:`n`, so

* angles are whole numbers of :math:`2^{-64}` turns: ``n`` times such an integer, in 64-bit arithmetic that wraps, is
  the angle without its full turns, exact for every ``n``;
* scales count rows from the centre of a *span* that holds every pair of rows that can attend to each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from longnet_dist.errors import ConfigError
from longnet_dist.geometry.documents import Documents, as_integer
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.position_encodings import (
    POSITION_ENCODINGS,
    Decay,
    PositionSettings,
    checked_decay,
    checked_turns,
)
from longnet_dist.numerics import wide_dtype

_TABLE_ROWS = 65536
"""Rows of the tables that are computed at once: on the way there an angle takes 60 bytes, in the tables 8 to 16."""


class RotaryTable(NamedTuple):
    """Hold the cosine and sine of each row and pair of channels, times the pair's scale: for queries, for keys.

    Both are ``(n, 1, D/2, 2)``, float32 or float64. They are one tensor if the encoding does not scale.
    """

    query: Tensor
    key: Tensor

    def rows(self, rows: slice) -> RotaryTable:
        """Return the tables of some of the rows."""
        return RotaryTable(self.query[rows], self.key[rows])

    def transposed(self) -> RotaryTable:
        """Return the transposed linear maps, which gradients of queries and keys take on their way back.

        A pair of channels is a complex number, and its factor ``c·exp(iφ)`` has the transpose ``c·exp(-iφ)``. Where
        ``c = 1`` (RoPE), that is the opposite rotation.
        """
        signs = 1 - 2 * torch.arange(2, device=self.query.device)
        return RotaryTable(self.query * signs, self.key * signs)


class Factors(NamedTuple):
    """Hold the constants of an encoding on a device.

    Attributes:
        turns: ``(D/2,)`` int64, the angle between two rows in units of ``2^-64`` turns.
        zeta: ``(D/2,)`` float64, the scale over ``scale_rows`` rows; None for an encoding that does not scale.
        scale_rows: see ``zeta``.
    """

    turns: Tensor
    zeta: Tensor | None
    scale_rows: int

    @property
    def tables(self) -> int:
        """Return the number of different tables: queries and keys share one if the encoding does not scale."""
        return 1 if self.zeta is None else 2

    def at(self, n: Tensor, places: Tensor, spans: Tensor | int) -> list[Tensor]:
        """Return the tables ``(n, 1, D/2, 2)``, float64, of rows ``n (n, 1, 1)`` of their texts.

        Args:
            n: index of each row in its text, int64.
            places: index of each row in its span.
            spans: rows of that span.
        """
        # The int64 product wraps at 2^64, which is a full turn: what is left is n θ_i without its full turns.
        angle = (n * self.turns).double() * (2 * math.pi / 2**64)
        factors = torch.stack([angle.cos(), angle.sin()], -1)
        if self.zeta is None:
            return [factors]
        # Queries take ζ^(m/rows) and keys ζ^(-m/rows), with m counted from the centre of the span. A score sees
        # only ζ^((m - m')/rows), in which the centre cancels.
        scale = self.zeta.pow((places - spans / 2) / self.scale_rows).unsqueeze(-1)
        return [factors * scale, factors / scale]


@dataclass(eq=False)
class Positions:
    """Place the queries and keys of one head dim at global rows; the layers of a model share one object and its cache.

    Attributes:
        theta: base of the wavelengths of the rotation, at least 1.
        xpos_base: rows over which xPos scales by ``ζ``; None for RoPE.
        encoding: name of a file of ``geometry/position_encodings``; if not given, ``"xpos"`` with an ``xpos_base`` and
            ``"rope"`` without.

    Raises:
        ConfigError: the encoding is not known or has no tables (``"none"``), or a base is out of range.
    """

    theta: float = 10000.0
    xpos_base: int | None = None
    encoding: str | None = None
    _cached: tuple[tuple[object, ...], RotaryTable] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.encoding is None:
            self.encoding = "rope" if self.xpos_base is None else "xpos"
        if not POSITION_ENCODINGS[self.encoding].rotates:
            raise ConfigError(f"positions {self.encoding!r} have no tables; use positions=None")
        if not (isinstance(self.theta, Real) and 1 <= float(self.theta) < math.inf):
            raise ConfigError(f"theta must be a number of at least 1, not {self.theta!r}; the default is 10000.0")
        if self.xpos_base is not None and (as_integer(self.xpos_base) or 0) < 1:
            raise ConfigError(f"xpos_base must be a positive number of rows, not {self.xpos_base!r}; use 512, or None")

    @property
    def name(self) -> str:
        """Return the name of the encoding."""
        assert self.encoding is not None
        return self.encoding

    def decay(self, head_dim: int) -> Decay | None:
        """Return the scales of each pair of channels; None if the encoding does not scale."""
        return checked_decay(self.name, head_dim, self._settings)

    def __call__(
        self, q: Tensor, k: Tensor, pattern: DilatedPattern, start: int, total_rows: int
    ) -> tuple[Tensor, Tensor]:
        """Place ``q (B, n, H, D)`` and ``k (B, n, Hkv, D)`` at global rows ``start … start+n-1``; their dtype is kept.

        Args:
            pattern: the pattern in which they will attend.
            start: global row of their first row.
            total_rows: ``N``.

        Raises:
            ConfigError: ``D`` is odd, or the scales leave the range of the dtype (see :meth:`check`).
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
        span = self.span(pattern, longest)
        wide = wide_dtype(dtype)
        key = (start, rows, span, head_dim, wide, device, batch, documents)
        if self._cached is None or self._cached[0] != key:
            self._cached = None  # so that the old tables' memory is free for the new
            with torch.inference_mode(False):  # the tables of a validation step may serve a training step
                self._cached = key, self._tables(start, rows, span, head_dim, wide, device, batch, documents)
        return self._cached[1]

    @property
    def kept(self) -> RotaryTable | None:
        """Return the tables of the last call, which this object keeps; None before the first."""
        return None if self._cached is None else self._cached[1]

    def factors(self, head_dim: int, device: torch.device) -> Factors:
        """Return what multiplies each pair of ``head_dim`` channels, with its constants on ``device``."""
        turns = torch.tensor(checked_turns(self.name, head_dim, self._settings), device=device)
        decay = self.decay(head_dim)
        zeta = None if decay is None else torch.tensor(decay.factors, dtype=torch.float64, device=device)
        return Factors(turns, zeta, 1 if decay is None else decay.rows)

    def span(self, pattern: DilatedPattern, total_rows: int) -> tuple[int, int]:
        """Return the rows of a span and the row at which one begins; ``(1, 0)`` for an encoding that does not scale."""
        # Without scales there is no span, and the tables serve layers with other grids as well.
        if not POSITION_ENCODINGS[self.name].scales:
            return 1, 0
        return attending_span(pattern, total_rows), span_start(pattern, total_rows)

    @property
    def _settings(self) -> PositionSettings:
        return PositionSettings(self.theta, self.xpos_base)

    def check(self, pattern: DilatedPattern, total_rows: int, head_dim: int, dtype: torch.dtype) -> None:
        """Raise ConfigError if these positions cannot serve ``total_rows`` rows of ``head_dim`` channels in ``dtype``.

        Scales are at most ``exp(span/2 · ln(1/ζ) / rows)``. Scaled queries meet scaled keys, so this must stay under
        the square root of the largest number of the dtype: the paper's 32,768 rows at base 512 do in float32 and
        bfloat16.
        """
        if head_dim < 2 or head_dim % 2:
            raise ConfigError(f"positions rotate pairs of channels, but head_dim is {head_dim}; use an even head_dim")
        if (decay := self.decay(head_dim)) is None:
            return
        span = attending_span(pattern, total_rows)
        exponent = span / 2 * -math.log(min(decay.factors))
        largest = math.log(torch.finfo(dtype).max) / 2
        if exponent / decay.rows > largest:
            raise ConfigError(
                f"{self.name} with base {decay.rows} leaves the range of {dtype} over the {span} rows in which "
                f"{pattern} lets rows attend; use xpos_base={math.ceil(exponent / largest)} or more, or rope"
            )

    def _tables(
        self,
        start: int,
        rows: int,
        span: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
        documents: Documents | None,
    ) -> RotaryTable:
        factors = self.factors(head_dim, device)
        tables = torch.empty(factors.tables, rows, 1, head_dim // 2, 2, dtype=dtype, device=device)
        for first in range(0, rows, _TABLE_ROWS):
            part = tables[:, first : first + _TABLE_ROWS]
            for table, values in zip(
                part, factors.at(*_indices(start + first, part.shape[1], span, device, documents)), strict=True
            ):
                table.copy_(values)
        if batch > 1:
            tables = tables.repeat(1, batch, 1, 1, 1)
        return RotaryTable(tables[0], tables[-1])


def _indices(
    start: int, rows: int, span: tuple[int, int], device: torch.device, documents: Documents | None
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Return ``(rows, 1, 1)``: the index of each row in its document and in its span; and the rows of that span.

    Padding counts from row 0 of the sequence, which nobody sees. A document that ends before the second span has one
    span, which begins with it.
    """
    n, (length, phase) = torch.arange(start, start + rows, device=device), span
    if documents is None:
        n = n.view(-1, 1, 1)
        return n, (n - phase) % length, length
    starts, lengths = (
        torch.from_numpy(x).to(device) for x in (documents.array_starts, documents.array_stops - documents.array_starts)
    )
    number = torch.searchsorted(starts, n, right=True) - 1
    document = number.clamp(min=0)
    firsts = torch.where(number < 0, 0, starts[document])
    own = torch.where(number < 0, 1, lengths[document])
    firsts, phases, spans = (
        x.view(-1, 1, 1) for x in (firsts, torch.where(own > phase, phase, 0), own.clamp(max=length))
    )
    n = n.view(-1, 1, 1) - firsts
    return n, (n - phases) % spans, spans


def attending_span(pattern: DilatedPattern, total_rows: int) -> int:
    """Return a ``span``, at most N, such that rows which attend to each other lie in one ``[s·span, (s+1)·span)``.

    Segments of length ``w`` never cross a multiple of a multiple of ``w``. With shifts, spans begin where all grids do
    (:func:`span_start`). Grids that never begin at one row leave the whole document.
    """
    if pattern.common_start is None:
        return total_rows
    return min(math.lcm(*pattern.segment_lengths), total_rows)


def span_start(pattern: DilatedPattern, total_rows: int) -> int:
    """Return a row at which a span begins, and which another span ends before; 0 if there is none in ``total_rows``."""
    start = pattern.common_start or 0
    return start if start < total_rows else 0


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
