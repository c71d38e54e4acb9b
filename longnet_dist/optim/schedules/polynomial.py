"""Polynomial decay, LongNet's (section 4.1)."""

from __future__ import annotations

from longnet_dist.optim.schedules import SCHEDULES, ScheduleSettings


@SCHEDULES.register("polynomial")
def polynomial(done: int, total: int, train: ScheduleSettings) -> float:
    """Return ``(1 - done / total) ** decay_power``; a power of 1 is linear."""
    return float((1 - done / total) ** train.decay_power)
