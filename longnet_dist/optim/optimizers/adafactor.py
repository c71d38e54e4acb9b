"""Adafactor (arXiv 1804.04235): second moments of a matrix as one factor for its rows and one for its columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longnet_dist.optim.optimizers import (
    OPTIMIZERS,
    OptimizerRule,
    OptimizerSettings,
    ParameterOf,
    Role,
    Shape,
    decay_groups,
)

if TYPE_CHECKING:
    import torch


@OPTIMIZERS.register("adafactor")
class Adafactor(OptimizerRule):
    """Keep ``m + n`` numbers of an ``m × n`` matrix. ZeRO's flat shards have no rows and columns, hence stage 0."""

    zero_stages = (0,)

    @staticmethod
    def states(role: Role, shape: Shape) -> dict[str, Shape]:
        """Return one factor for rows and one for columns of a matrix, ``variance`` of a vector."""
        if len(shape) < 2:
            return {"variance": shape}
        return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}

    @staticmethod
    def build(parameters: list[ParameterOf], train: OptimizerSettings) -> torch.optim.Optimizer:
        """Make torch's Adafactor with its own defaults."""
        import torch

        return torch.optim.Adafactor(decay_groups(parameters, train), lr=train.learning_rate)
