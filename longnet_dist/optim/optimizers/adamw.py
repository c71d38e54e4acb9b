"""AdamW (arXiv 1711.05101), LongNet's optimizer (appendix A)."""

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


@OPTIMIZERS.register("adamw")
class AdamW(OptimizerRule):
    """Keep two moments of every number."""

    keys = ("adam_betas", "adam_eps")

    @staticmethod
    def states(role: Role, shape: Shape) -> dict[str, Shape]:
        """Return both moments, which have the shape of the parameter."""
        return {"exp_avg": shape, "exp_avg_sq": shape}

    @staticmethod
    def build(parameters: list[ParameterOf], train: OptimizerSettings) -> torch.optim.Optimizer:
        """Make torch's AdamW, fused on a GPU."""
        import torch

        return torch.optim.AdamW(
            decay_groups(parameters, train),
            lr=train.learning_rate,
            betas=train.adam_betas,
            eps=train.adam_eps,
            fused=torch.cuda.is_available(),
        )
