"""Steps whose loss or gradient lies far beyond those before are skipped (``train.skip_spikes``)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import fmean, pstdev

WINDOW = 128  # steps
SIGMAS = 6.0


class RecentSteps:
    """The RecentSteps are loss and gradient norm of the last 128 steps, skipped ones too, if they are finite.

    A step is a spike if its loss or its gradient norm is more than six standard deviations above the mean of these.
    Spikes widen the deviation, so that a lasting change is followed after a few steps. Nothing is a spike before half
    of the window is full.

    Args:
        values: pairs of loss and gradient norm, oldest first, from :meth:`values` of an earlier start.
    """

    def __init__(self, values: Iterable[Sequence[float]] = ()) -> None:
        self._pairs = deque(((loss, norm) for loss, norm in values), maxlen=WINDOW)

    def is_spike(self, loss: float, grad_norm: float) -> bool:
        """Say whether a step that is not yet among them is a spike.

        Args:
            loss: mean loss of the step, nats.
            grad_norm: norm of its gradient before clipping.
        """
        if len(self._pairs) < WINDOW // 2:
            return False
        recent = zip(*self._pairs, strict=True)
        return any(_is_beyond(value, before) for value, before in zip((loss, grad_norm), recent, strict=True))

    def add(self, loss: float, grad_norm: float) -> None:
        """Add a step.

        Args:
            loss: mean loss of the step, nats.
            grad_norm: norm of its gradient before clipping.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._pairs.append((loss, grad_norm))

    def values(self) -> list[list[float]]:
        """Return the pairs of loss and gradient norm, oldest first, for a checkpoint."""
        return [list(pair) for pair in self._pairs]


def _is_beyond(value: float, before: Sequence[float]) -> bool:
    return value > fmean(before) + SIGMAS * pstdev(before) and pstdev(before) > 0
