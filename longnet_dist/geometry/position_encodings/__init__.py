r"""Position encodings (``model.positions``), each in a file of its own.

An encoding multiplies channel pair :math:`i` of row :math:`n`, a complex number, by a factor:
:math:`\zeta_i^{n/b} e^{2\pi\mathrm{i}\, n t_i}` for a query and :math:`\zeta_i^{-n/b} e^{2\pi\mathrm{i}\, n t_i}` for a
key. A file registers a class that gives the turns :math:`t_i` and, if it scales, :math:`\zeta_i` and :math:`b`::

    @POSITION_ENCODINGS.register("half")
    class Half(PositionEncoding):
        @staticmethod
        def turns(head_dim, settings):
            return tuple(turn * (i % 2) for i, turn in enumerate(turns_of_wavelengths(settings.theta, head_dim)))

Nothing else must know of it: ``attention/positions.py`` makes its tables, and configuration, engine and planner ask its
properties.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import NamedTuple

from longnet_dist.caches import bounded_cache
from longnet_dist.errors import ConfigError
from longnet_dist.registry import Registry

TWO_PI = Decimal("6.28318530717958647692528676655900576839433879875021")


class PositionSettings(NamedTuple):
    """Hold the keys of a model that an encoding may read.

    Attributes:
        theta: base of the wavelengths, at least 1 (``model.rope_theta``).
        decay_rows: rows over which a scale acts once (``model.xpos_base``); None where nobody gave it.
    """

    theta: float
    decay_rows: int | None


class Decay(NamedTuple):
    """Hold the scales of an encoding: row ``n`` of a query takes ``ζ_i^(n/rows)``, row ``n`` of a key its inverse.

    Attributes:
        factors: ``ζ_i`` of each pair of channels, in ``(0, 1]``.
        rows: rows over which ``ζ_i`` acts once.
    """

    factors: tuple[float, ...]
    rows: int


class PositionEncoding:
    """Give the turns and scales of each pair of channels, and say what the callers may take for granted.

    Attributes:
        rotates: whether rows are multiplied by factors at all; without it there are no tables, and ``turns`` is not
            asked.
        scales: whether the factors have a modulus besides 1. Then queries and keys have different tables, rows count
            from the centre of the span in which they attend, and the model must be causal.
    """

    rotates: bool = True
    scales: bool = False

    @staticmethod
    def turns(head_dim: int, settings: PositionSettings) -> tuple[int, ...]:
        """Return the turn from a row to the next for each of ``head_dim / 2`` pairs, in units of ``2^-64`` turns."""
        raise NotImplementedError

    @staticmethod
    def decay(head_dim: int, settings: PositionSettings) -> Decay:
        """Return the scales; asked only where ``scales``."""
        raise NotImplementedError

    @classmethod
    def num_tables(cls) -> int:
        """Return the number of tables of factors: one for queries and keys together, or one for each."""
        return cls.rotates + cls.scales


POSITION_ENCODINGS: Registry[type[PositionEncoding]] = Registry("positions", __name__)


def checked_turns(name: str, head_dim: int, settings: PositionSettings) -> tuple[int, ...]:
    """Return an encoding's turns, in ``[-2^63, 2^63)``: a full turn more or less is the same factor.

    Raises:
        ConfigError: they are not one integer for each pair of channels.
    """
    turns = POSITION_ENCODINGS[name].turns(head_dim, settings)
    if len(turns) != head_dim // 2 or not all(isinstance(turn, int) for turn in turns):
        raise ConfigError(
            f"positions {name!r} give the turns {list(turns)} for head_dim {head_dim}, which has {head_dim // 2} pairs "
            f"of channels; correct the encoding: one integer for each, in units of 2^-64 turns"
        )
    return tuple((turn + 2**63) % 2**64 - 2**63 for turn in turns)


def checked_decay(name: str, head_dim: int, settings: PositionSettings) -> Decay | None:
    """Return an encoding's scales, None if it does not scale.

    Raises:
        ConfigError: they are not one factor in ``(0, 1]`` for each pair of channels, or there are no rows.
    """
    encoding = POSITION_ENCODINGS[name]
    if not encoding.scales:
        return None
    decay = encoding.decay(head_dim, settings)
    if len(decay.factors) != head_dim // 2 or not all(0 < factor <= 1 for factor in decay.factors) or decay.rows < 1:
        raise ConfigError(
            f"positions {name!r} give the scales {list(decay.factors)} over {decay.rows} rows for head_dim {head_dim}, "
            f"which has {head_dim // 2} pairs of channels; correct the encoding: one factor in (0, 1] for each"
        )
    return decay


@bounded_cache(maxsize=8)
def turns_of_wavelengths(theta: float, head_dim: int) -> tuple[int, ...]:
    """Return ``θ^(-2i/D) / 2π`` for each pair of channels ``i``, in units of ``2^-64`` turns, rounded once."""
    with localcontext() as context:
        context.prec = 40
        base = Decimal(theta)
        return tuple(round(base ** (Decimal(-2 * i) / head_dim) / TWO_PI * 2**64) for i in range(head_dim // 2))
