"""The model of a run: a LongNet, an encoder, or a decoder of transformers."""

from __future__ import annotations

from typing import Any

import torch

from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.config.hf_model import HuggingFaceConfig
from longnet_dist.config.model import LongNetConfig
from longnet_dist.extras import require_extra
from longnet_dist.model.encoder import LongNetEncoder
from longnet_dist.model.longnet import LongNet


def new_model(config: LongNetConfig, **options: Any) -> Any:
    """Return a model with weights that follow from the seed of torch's default generator.

    Args:
        config: the section ``model`` of a run.
        options: ``group``, ``overlap``, ``backend``, ``deterministic``, ``execution``, as :class:`LongNet` takes them.

    Returns:
        a :class:`LongNet`, a decoder of transformers that is called and streamed like one, or an encoder.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    if isinstance(config, EncoderConfig):
        return LongNetEncoder(config, **options)
    if not isinstance(config, HuggingFaceConfig):
        return LongNet(config, **options)
    require_extra("hf", "model.path")
    from longnet_dist.hf.decoder.streamed_decoder import StreamedDecoder

    return StreamedDecoder(config, **options)


def parameter_sizes(config: LongNetConfig) -> dict[str, list[int]]:
    """Return the shape of each parameter of a model, by its name; nothing is allocated."""
    with torch.device("meta"):
        return {name: list(parameter.shape) for name, parameter in new_model(config).named_parameters()}
