"""No positions: the causal mask and the pattern alone order the rows (NoPE, arXiv 2305.19466)."""

from __future__ import annotations

from longnet_dist.geometry.position_encodings import POSITION_ENCODINGS, PositionEncoding


@POSITION_ENCODINGS.register("none")
class NoPositions(PositionEncoding):
    """Leave queries and keys as they are."""

    rotates = False
