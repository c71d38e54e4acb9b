"""The learning rate of a step."""

from __future__ import annotations

from longnet_dist.config.schema import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """Linear warm-up, then polynomial decay (LongNet, section 4.1), a function of the step alone.

        warm-up:  peak · step / warmup                                          step = 1 … warmup
        decay:    final + (peak − final) · (1 − (step − 1 − warmup) / (steps − warmup))^power

    so that the first step after warm-up has the peak and the last step still learns.

    Args:
        step: counted from 1.
        train: ``learning_rate``, ``final_learning_rate``, ``warmup_steps``, ``steps``, ``decay_power``.
    """
    peak, final = train.learning_rate, train.final_learning_rate
    if step <= train.warmup_steps:
        return peak * step / train.warmup_steps
    remaining = 1 - (step - 1 - train.warmup_steps) / (train.steps - train.warmup_steps)
    return final + (peak - final) * float(remaining**train.decay_power)
