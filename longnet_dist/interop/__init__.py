"""Models of other programs, from their weights alone: nothing is unpickled but tensors, and none of their code runs."""

from __future__ import annotations

from longnet_dist.interop.gigapath import SlideEncoder, gigapath_slide_encoder
from longnet_dist.interop.longvit import LongViT, longvit_encoder
from longnet_dist.interop.torchscale import from_torchscale, to_torchscale

__all__ = [
    "LongViT",
    "SlideEncoder",
    "from_torchscale",
    "gigapath_slide_encoder",
    "longvit_encoder",
    "to_torchscale",
]
