"""Which parameters of a model are matrices of hidden layers, embeddings, the output projection, norms and biases."""

from __future__ import annotations

from torch import nn

from longnet_dist.model.feature_tasks import TaskHead
from longnet_dist.model.head import LanguageModelHead
from longnet_dist.optim.optimizers import Role


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """Return the role of each parameter, by its name.

    A weight that embedding and output projection share is an embedding.
    """
    special: dict[int, Role] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            special[id(module.weight)] = "embedding"
        elif isinstance(module, LanguageModelHead | TaskHead):
            special.setdefault(id(module.weight), "head")
    if (head := getattr(model, "output_layer", None)) is not None:  # of a decoder of transformers
        special.setdefault(id(head.weight), "head")
    return {
        name: special.get(id(parameter), "matrix" if _dims(parameter) == 2 else "vector")
        for name, parameter in model.named_parameters()
    }


def _dims(parameter: nn.Parameter) -> int:
    """Return the number of dims; ZeRO stage 3 leaves an empty tensor in the place of a parameter."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
