"""Warm-up, stable, decay (arXiv 2404.06395): before its decay the rate does not depend on the steps of the run."""

from __future__ import annotations

from longnet_dist.optim.schedules import SCHEDULES, ScheduleSettings


@SCHEDULES.register("wsd")
def wsd(done: int, total: int, train: ScheduleSettings) -> float:
    """Return 1, and over the last ``decay_fraction`` of all steps of the run a linear decay."""
    decay = min(total, max(1, round(train.decay_fraction * train.steps)))
    return min(1.0, (total - done) / decay)
