r"""Muon and AdamW in one optimizer that also trains ZeRO's flat shards.

Muon makes the momentum of a matrix orthogonal and takes it for the update (arXiv 2502.16982):

.. math::
    B_t = \mu B_{t-1} + (1 - \mu) G_t, \qquad U_t = (1 - \mu) G_t + \mu B_t, \qquad
    W_t = (1 - \eta\lambda) W_{t-1} - 0.2 \sqrt{\max(m, n)}\, \eta \operatorname{orthogonal}(U_t)

With this factor the updates are as large as AdamW's, so both take one learning rate. Momentum and weights are updated
number by number, in shards of any shape. Only ``orthogonal`` needs whole matrices, which all ranks gather for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longnet_dist.optim.optimizers import OptimizerSettings


class MatrixShards(Protocol):
    """Know of which matrices a flat shard is a part."""

    def per_matrix(self, shard: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return this rank's shard of ``function`` of each whole matrix; every rank must call.

        Args:
            shard: ``(numbers,)``, float32.
            function: of a matrix ``(m, n)``, with the same result on every rank.
        """


class MuonWithAdamW(torch.optim.Optimizer):
    """Update matrices by Muon and all other parameters by AdamW.

    Args:
        matrices: weights of hidden layers, ``(m, n)``.
        others: groups of all other parameters, with their ``weight_decay``.
        train: learning rate, momentum, and the settings of AdamW.

    Attributes:
        shards: by the ``id`` of a flat parameter, the matrices of which it is a part. Whoever cuts the parameters sets
            it; those that are matrices themselves need none.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[dict[str, Any]], train: OptimizerSettings) -> None:
        muon = {"params": matrices, "weight_decay": train.weight_decay, "momentum": train.muon_momentum}
        super().__init__([*([muon] if matrices else []), *others], {"lr": train.learning_rate, "momentum": None})
        self.shards: dict[int, MatrixShards] = {}
        self._adamw: torch.optim.AdamW | None = None
        if others:
            fused = torch.cuda.is_available()
            # It takes the dictionaries of the groups themselves, so both optimizers see one learning rate.
            self._adamw = torch.optim.AdamW(others, train.learning_rate, train.adam_betas, train.adam_eps, fused=fused)
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters of ``param_groups``, some of which DeepSpeed takes out for the time of a call."""
        assert closure is None
        for group in self.param_groups:
            if group["momentum"] is not None:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, parameter.grad, group)
        if self._adamw:
            self._adamw.param_groups = [group for group in self.param_groups if group["momentum"] is None]
            self._adamw.step()

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[parameter], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        # B ← μ B + (1 - μ) G
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        # U = (1 - μ) G + μ B, Nesterov's look ahead
        ahead = gradient.lerp(buffer, momentum)
        whole = parameter.dim() == 2
        update = orthogonal(ahead) if whole else self.shards[id(parameter)].per_matrix(ahead, orthogonal)
        # W ← (1 - ηλ) W - η · 0.2 √max(m, n) · orthogonal(U)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """Return the orthogonal factor of a matrix ``(m, n)``, float32, times ``0.2 √max(m, n)``.

    A step of torch's Muon from zero, with a learning rate of 1 and no momentum, is its negative. The iteration of
    Newton and Schulz runs in bfloat16, and leaves singular values between about 0.7 and 1.2.
    """
    result = torch.zeros_like(matrix, requires_grad=False)
    result.grad = matrix
    options: dict[str, Any] = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    muon: torch.optim.Optimizer = torch.optim.Muon([result], lr=1.0, adjust_lr_fn="match_rms_adamw", **options)
    muon.step()
    result.grad = None
    return result.neg_()
