"""Extrapolatable positions (xPos, arXiv 2212.10554)."""

from __future__ import annotations

from longnet_dist.errors import ConfigError
from longnet_dist.geometry.position_encodings import POSITION_ENCODINGS, Decay, PositionSettings
from longnet_dist.geometry.position_encodings.rope import Rope


@POSITION_ENCODINGS.register("xpos")
class Xpos(Rope):
    """Rotate as RoPE, and let a score decay with the distance of its key: ``ζ_i = (2i/D + 0.4) / 1.4``."""

    scales = True

    @staticmethod
    def decay(head_dim: int, settings: PositionSettings) -> Decay:
        """Return ``(2i/D + 0.4) / 1.4`` for each pair ``i``, over ``xpos_base`` rows.

        Raises:
            ConfigError: there is no ``xpos_base``.
        """
        if settings.decay_rows is None:
            raise ConfigError("xpos needs the rows over which it decays; use xpos_base=512 (the paper's), or rope")
        return Decay(tuple((2 * i / head_dim + 0.4) / 1.4 for i in range(head_dim // 2)), settings.decay_rows)
