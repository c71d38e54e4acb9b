"""The one place where a backend is chosen."""

from __future__ import annotations

import torch

from longnet_dist.errors import ConfigError
from longnet_dist.kernels.contract import Kernel
from longnet_dist.kernels.reference import ReferenceKernel
from longnet_dist.kernels.sdpa import SdpaKernel

BACKENDS = ("auto", "reference", "sdpa")


def choose_kernel(backend: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel of ``backend``; ``"auto"`` takes the fastest that runs on the device.

    Raises:
        ConfigError: an unknown backend, or one that cannot run on the device or in the dtype.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "auto":
        backend = "sdpa" if device.type == "cpu" else "reference"
    if backend == "sdpa" and device.type != "cpu":
        raise ConfigError(f"backend 'sdpa' runs on the CPU, but the tensors are on {device}; use 'auto'")
    return SdpaKernel() if backend == "sdpa" else ReferenceKernel()
