"""The one place where a backend is chosen."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

from longnet_dist.attention.kernels.contract import Kernel
from longnet_dist.attention.kernels.reference import ReferenceKernel
from longnet_dist.attention.kernels.sdpa import SdpaKernel
from longnet_dist.errors import ConfigError
from longnet_dist.numerics import log_once

BACKENDS = ("auto", "reference", "sdpa", "triton", "flash")
_GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def choose_kernel(backend: str, device: torch.device, dtype: torch.dtype, deterministic: bool = False) -> Kernel:
    """The kernel of ``backend``; ``"auto"`` takes the fastest that runs on the device.

    On a GPU (benchmarks/results/attention_kernels.md) that is ``triton``, then ``flash``, then ``reference``; why
    one is passed over is logged once.

    Raises:
        ConfigError: an unknown backend, or one that cannot run on the device, in the dtype or deterministically.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "auto":
        return _fastest(device, dtype, deterministic)
    reason = _obstacle(backend, device, dtype, deterministic)
    if reason:
        raise ConfigError(f"backend {backend!r} {reason}; use 'auto'")
    return _kernel(backend)


def _fastest(device: torch.device, dtype: torch.dtype, deterministic: bool) -> Kernel:
    for backend in ("sdpa",) if device.type == "cpu" else ("triton", "flash"):
        reason = _obstacle(backend, device, dtype, deterministic)
        if not reason:
            return _kernel(backend)
        log_once(f"dilated attention passes over backend {backend!r}: it {reason}")
    return _kernel("reference")


def _obstacle(backend: str, device: torch.device, dtype: torch.dtype, deterministic: bool) -> str:
    """Why ``backend`` cannot run, or an empty string."""
    if backend == "reference":
        return ""
    if backend == "sdpa":
        return "" if device.type == "cpu" else f"runs on the CPU, but the tensors are on {device}"
    if backend == "triton" and device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1" and dtype == torch.float32 and has_triton():
            return ""
        return "runs on a CPU only in float32 in Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"runs on a GPU, but the tensors are on {device}"
    if backend == "triton":
        if not has_triton():
            return "needs the package triton"
        return "" if dtype in _GPU_DTYPES else f"takes bfloat16, float16 and float32, not {dtype}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    return "cannot promise deterministic gradients" if deterministic else ""


@lru_cache(maxsize=len(BACKENDS))
def _kernel(backend: str) -> Kernel:
    if backend == "triton":
        from longnet_dist.attention.kernels.triton.kernel import TritonKernel  # triton is absent on most CPUs

        return TritonKernel()
    if backend == "flash":
        from longnet_dist.attention.kernels.flash import FlashKernel, find_engine

        return FlashKernel(find_engine())
    return SdpaKernel() if backend == "sdpa" else ReferenceKernel()


def takes_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels of our own for row-wise work run there: on GPUs."""
    return device.type == "cuda" and not _obstacle("triton", device, dtype, deterministic=False)


def has_triton() -> bool:
    """Whether Triton is installed; it is absent on most CPUs."""
    return importlib.util.find_spec("triton") is not None
