"""Rotary position embedding (RoPE, arXiv 2104.09864)."""

from __future__ import annotations

from longnet_dist.geometry.position_encodings import (
    POSITION_ENCODINGS,
    PositionEncoding,
    PositionSettings,
    turns_of_wavelengths,
)


@POSITION_ENCODINGS.register("rope")
class Rope(PositionEncoding):
    """Rotate pair ``i`` of row ``n`` by ``n θ^(-2i/D)``."""

    @staticmethod
    def turns(head_dim: int, settings: PositionSettings) -> tuple[int, ...]:
        """Return ``θ^(-2i/D)`` radians for each pair ``i``, in units of ``2^-64`` turns."""
        return turns_of_wavelengths(settings.theta, head_dim)
