"""Muon for hidden matrices (arXiv 2502.16982), AdamW for the embedding, the output projection, norms and biases."""

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


@OPTIMIZERS.register("muon")
class Muon(OptimizerRule):
    """Keep one moment of hidden matrices, and AdamW's two of all other parameters."""

    host_offload = False
    gathers_matrices = True
    keys = ("adam_betas", "adam_eps", "muon_momentum")

    @staticmethod
    def states(role: Role, shape: Shape) -> dict[str, Shape]:
        """Return the momentum of a matrix, or AdamW's two moments."""
        return {"momentum_buffer": shape} if role == "matrix" else {"exp_avg": shape, "exp_avg_sq": shape}

    @staticmethod
    def build(parameters: list[ParameterOf], train: OptimizerSettings) -> torch.optim.Optimizer:
        """Make the optimizer of both; ``shards`` is empty as long as parameters are whole."""
        from longnet_dist.optim.orthogonal_momentum import MuonWithAdamW

        matrices = [parameter.tensor for parameter in parameters if parameter.role == "matrix"]
        others = decay_groups([parameter for parameter in parameters if parameter.role != "matrix"], train)
        return MuonWithAdamW(matrices, others, train)
