"""Cosine decay (arXiv 1608.03983, without restarts)."""

from __future__ import annotations

import math

from longnet_dist.optim.schedules import SCHEDULES, ScheduleSettings


@SCHEDULES.register("cosine")
def cosine(done: int, total: int, train: ScheduleSettings) -> float:
    """Return ``(1 + cos(π · done / total)) / 2``."""
    return (1 + math.cos(math.pi * done / total)) / 2
