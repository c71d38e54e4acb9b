"""Learning-rate schedules (``train.schedule``), each in a file of its own.

A schedule registers a function under its name::

    @SCHEDULES.register("constant")
    def constant(done: int, total: int, train: ScheduleSettings) -> float:
        return 1.0

All begin with the same linear warm-up. They differ in the share of the peak that is left behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from longnet_dist.registry import Registry


class ScheduleSettings(Protocol):
    """Name the keys of section ``train`` that a schedule may read."""

    @property
    def schedule(self) -> str:
        """Return the name of the schedule."""

    @property
    def learning_rate(self) -> float:
        """Return the peak."""

    @property
    def final_learning_rate(self) -> float:
        """Return the rate in which the decay ends."""

    @property
    def warmup_steps(self) -> int:
        """Return the steps of the warm-up."""

    @property
    def steps(self) -> int:
        """Return the steps of the run."""

    @property
    def decay_power(self) -> float:
        """Return the power of a polynomial decay."""

    @property
    def decay_fraction(self) -> float:
        """Return the share of the steps in which ``wsd`` decays."""


Schedule = Callable[[int, int, ScheduleSettings], float]
"""``(done, total, train)`` to a share in ``[0, 1]``: steps behind the warm-up that are done, and all of them."""

SCHEDULES: Registry[Schedule] = Registry("train.schedule", __name__)


def learning_rate(step: int, train: ScheduleSettings) -> float:
    r"""Return the learning rate of a step: a function of the step alone, so that a resumed run has the same.

    .. math::
        \mathrm{peak} \cdot \frac{\mathrm{step}}{\mathrm{warmup}} \;(\mathrm{step} \le \mathrm{warmup}), \qquad
        \mathrm{final} + (\mathrm{peak} - \mathrm{final}) \cdot \mathrm{share}(\mathrm{step} - 1 - \mathrm{warmup})

    The first step behind the warm-up has the peak, and the last step still learns.

    Args:
        step: counted from 1.
        train: ``schedule``, ``learning_rate``, ``final_learning_rate``, ``warmup_steps``, ``steps``.
    """
    peak, final = train.learning_rate, train.final_learning_rate
    if step <= train.warmup_steps:
        return peak * step / train.warmup_steps
    share = SCHEDULES[train.schedule](step - 1 - train.warmup_steps, train.steps - train.warmup_steps, train)
    return final + (peak - final) * share
