"""Learning-rate schedules (``train.schedule``), each in a file of its own.

A schedule registers a function under its name::

    @SCHEDULES.register("constant")
    def constant(done: int, total: int, train: ScheduleSettings) -> float:
        return 1.0

All begin with the same linear warm-up. They differ in the share of the peak that is left behind it.

A run that resumes with other settings, such as more steps, keeps its learning rate. Its schedule starts again from that
rate (:class:`ScheduleStart`) and has the steps that are left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from pydantic import BaseModel, ConfigDict

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
"""``(done, total, train)`` to a share in ``[0, 1]``: steps that are done, and all, behind the warm-up or the start."""

SCHEDULES: Registry[Schedule] = Registry("train.schedule", __name__)


class ScheduleStart(BaseModel):
    """Say where a schedule starts again, because the run was resumed with settings that would make its rate jump.

    Attributes:
        step: the last one before it.
        share: of ``learning_rate``, which the run had at that step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    share: float


def learning_rate(step: int, train: ScheduleSettings, start: ScheduleStart | None = None) -> float:
    r"""Return the learning rate of a step: a function of the step alone, so that a resumed run has the same.

    .. math::
        \mathrm{peak} \cdot \frac{\mathrm{step}}{\mathrm{warmup}} \;(\mathrm{step} \le \mathrm{warmup}), \qquad
        \mathrm{final} + (\mathrm{peak} - \mathrm{final}) \cdot \mathrm{share}(\mathrm{step} - 1 - \mathrm{warmup})

    The first step behind the warm-up has the peak, and the last step still learns.

    With a start, the warm-up rises from the rate of the start instead of 0. If the warm-up is over by then, the decay
    begins at the start, with its rate in place of the peak.

    Args:
        step: counted from 1, later than the start.
        train: ``schedule``, ``learning_rate``, ``final_learning_rate``, ``warmup_steps``, ``steps``.
        start: where the schedule starts again, if it does.
    """
    peak, final, warmup = train.learning_rate, train.final_learning_rate, train.warmup_steps
    first, rate = (start.step, start.share * peak) if start else (0, 0.0)
    if step <= warmup:
        return rate + (peak - rate) * (step - first) / (warmup - first)
    top = rate if start and first >= warmup else peak
    begin = max(first, warmup)
    share = SCHEDULES[train.schedule](step - 1 - begin, train.steps - begin, train)
    return final + (top - final) * share


def start_after(
    step: int, before: ScheduleSettings, now: ScheduleSettings, start: ScheduleStart | None = None
) -> ScheduleStart | None:
    """Return where the schedule of a resumed run starts, so that its learning rate does not jump.

    A start that gives the last step its rate stays; so does a schedule without a start.

    Args:
        step: the last one that was done.
        before: the settings with which it was done, except ``learning_rate``: that is the one of now, since whoever
            changes it wants another rate.
        now: the settings of the steps to come.
        start: where the schedule started before, if it did.
    """
    rate = learning_rate(step, before, start)
    for known in (start, None):
        if math.isclose(learning_rate(step, now, known), rate, rel_tol=1e-6):
            return known
    return ScheduleStart(step=step, share=rate / now.learning_rate)


def course(train: ScheduleSettings, start: ScheduleStart) -> str:
    """Return how the learning rate goes on after a start, for people."""
    rate, peak, warmup = start.share * train.learning_rate, train.learning_rate, train.warmup_steps
    text = f"{rate:.3g} after step {start.step:,}, "
    if start.step < warmup:
        text += f"{peak:g} at the end of the warm-up, step {warmup:,}, "
    text += f"then by train.schedule={train.schedule} to {train.final_learning_rate:g} at step {train.steps:,}"
    if start.step < warmup:
        return text
    return f"{text} (with train.warmup_steps above {start.step} it rises to {peak:g} first)"
