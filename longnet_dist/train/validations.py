"""The validations of a run: which was the best, and how many have come since."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Validations:
    """The Validations of a run so far, the same on every rank.

    Attributes:
        best: least finite validation loss, nats; None before the first.
        since_best: validations since then.
        step: of the last validation, 0 before the first.
        loss: of the last validation; None if it is not finite.
    """

    best: float | None = None
    since_best: int = 0
    step: int = 0
    loss: float | None = None

    def add(self, step: int, loss: float) -> None:
        """Add the validation after a step.

        Args:
            step: number of the step.
            loss: mean loss of the validation, nats.
        """
        self.step, self.loss = step, loss if math.isfinite(loss) else None
        if self.loss is not None and (self.best is None or self.loss < self.best):
            self.best, self.since_best = self.loss, 0
        else:
            self.since_best += 1

    def loss_after(self, step: int) -> float | None:
        """Return the finite loss of the validation after a step, None if there is none."""
        return self.loss if self.step == step else None

    def is_best(self, step: int) -> bool:
        """Say whether there was a validation after a step, with the least loss so far."""
        return self.step == step and self.loss is not None and self.since_best == 0

    def is_exhausted(self, patience: int) -> bool:
        """Say whether so many validations in a row were no better that a run ends; 0 is never."""
        return 0 < patience <= self.since_best
