"""Optimizers (``train.optimizer``), each in a file of its own.

A file registers a class with the attributes of :class:`OptimizerRule` under its name::

    @OPTIMIZERS.register("sgd")
    class Sgd(OptimizerRule):
        @staticmethod
        def states(role, shape):
            return {"momentum_buffer": shape}

        @staticmethod
        def build(parameters, train):
            return torch.optim.SGD(decay_groups(parameters, train), lr=train.learning_rate, momentum=0.9)

Nothing else must know of it: training, checkpoints and the planner ask the class. A file is imported to check a
configuration, so it imports torch only inside functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from longnet_dist.registry import Registry

if TYPE_CHECKING:
    import torch

Role = Literal["matrix", "head", "embedding", "vector"]
"""What a parameter is: weight of a hidden linear layer, output projection, look-up, or norm and bias."""

Shape = tuple[int, ...]


class OptimizerSettings(Protocol):
    """Name the keys of section ``train`` that an optimizer may read."""

    @property
    def learning_rate(self) -> float:
        """Return the peak of the schedule, which sets the rate of every step."""

    @property
    def weight_decay(self) -> float:
        """Return the weight decay of matrices."""

    @property
    def adam_betas(self) -> tuple[float, float]:
        """Return the decay rates of AdamW's two moments."""

    @property
    def adam_eps(self) -> float:
        """Return AdamW's epsilon."""

    @property
    def muon_momentum(self) -> float:
        """Return Muon's decay rate of the momentum."""


class ParameterOf(NamedTuple):
    """Hold a parameter and its role.

    Attributes:
        role: see :data:`Role`.
        tensor: the parameter, on every rank the same.
    """

    role: Role
    tensor: torch.nn.Parameter


class OptimizerRule:
    """Build an optimizer, and say what training, checkpoints and the planner must know of it.

    Attributes:
        zero_stages: ZeRO stages in which it trains exactly.
        host_offload: whether it can update on the CPU (``deepspeed.offload_optimizer``).
        gathers_matrices: whether an update needs whole matrices; the engine then sets ``shards`` of the optimizer, and
            the planner counts a float32 copy of all matrices.
        keys: keys of section ``train`` that belong to some optimizers and that this one reads.
    """

    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    host_offload: bool = True
    gathers_matrices: bool = False
    keys: tuple[str, ...] = ()

    @staticmethod
    def states(role: Role, shape: Shape) -> dict[str, Shape]:
        """Return the float32 tensors that the optimizer keeps of a parameter, by name, as torch calls them.

        They are written into checkpoints, one file a name. The count of steps is none of them. With ZeRO stages above
        0 they must have the shape of the parameter.

        Args:
            role: of the parameter.
            shape: of the whole parameter.
        """
        raise NotImplementedError

    @staticmethod
    def build(parameters: list[ParameterOf], train: OptimizerSettings) -> torch.optim.Optimizer:
        """Make the optimizer.

        Args:
            parameters: all of the model.
            train: the settings of the run.
        """
        raise NotImplementedError


OPTIMIZERS: Registry[type[OptimizerRule]] = Registry("train.optimizer", __name__)


def decay_groups(parameters: list[ParameterOf], train: OptimizerSettings) -> list[dict[str, Any]]:
    """Return groups of parameters for a torch optimizer: matrices decay, embeddings and vectors do not."""
    decayed = [parameter.tensor for parameter in parameters if parameter.role in ("matrix", "head")]
    others = [parameter.tensor for parameter in parameters if parameter.role not in ("matrix", "head")]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
