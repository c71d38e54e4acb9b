"""The one place where a backend is chosen."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache

import torch

from longnet_dist.attention.kernels.contract import Kernel
from longnet_dist.attention.kernels.hopper import support
from longnet_dist.attention.kernels.reference import ReferenceKernel
from longnet_dist.attention.kernels.sdpa import SdpaKernel
from longnet_dist.errors import ConfigError
from longnet_dist.numerics import log_once

BACKENDS = ("auto", "reference", "sdpa", "triton", "flash")
_GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """Name the kernels that a call of dilated attention runs.

    Attributes:
        backend: one of ``BACKENDS`` but ``"auto"``.
        forward: ``"hopper"`` or ``"portable"`` of the backend ``"triton"``; of another backend its name.
        backward: the same for the backward pass.
        reason: why no faster kernel runs; an empty string where the fastest one does.
        remedy: what the user can do to get a faster kernel; an empty string where nothing helps.
    """

    backend: str
    forward: str
    backward: str
    reason: str = ""
    remedy: str = ""


def choose_kernel(backend: str, device: torch.device, dtype: torch.dtype, deterministic: bool = False) -> Kernel:
    """Return the kernel of ``backend``; ``"auto"`` takes the fastest that runs on the device.

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


def describe_kernels(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    backend: str = "auto",
    deterministic: bool = False,
    capability: tuple[int, int] | None = None,
) -> KernelChoice:
    """Say which kernels a call gets, and why. Nothing is compiled, launched or logged.

    The answer holds for contiguous tensors. The kernels for Hopper leave tensors that the copy engine cannot see to
    the portable ones.

    Args:
        device: of the tensors.
        dtype: of the tensors.
        head_dim: of the tensors.
        backend: as of ``dilated_attention``.
        deterministic: as of ``dilated_attention``.
        capability: compute capability of the GPU, by default that of ``device``.

    Raises:
        ConfigError: an unknown backend, or one that cannot run on the device, in the dtype or deterministically.
    """
    passed_over = []
    if backend == "auto":
        for name in _by_speed(device):
            obstacle = _obstacle(name, device, dtype, deterministic)
            if not obstacle:
                backend = name
                break
            passed_over.append(f"backend {name!r} {obstacle}")
        else:
            backend = "reference"
    else:
        choose_kernel(backend, device, dtype, deterministic)
    if backend == "triton" and device.type == "cuda":
        return _triton_kernels(capability or torch.cuda.get_device_capability(device), dtype, head_dim, deterministic)
    lacks_triton = device.type == "cuda" and not has_triton()
    remedy = "install triton" if lacks_triton and passed_over else ""
    return KernelChoice(backend, backend, backend, "; ".join(passed_over), remedy)


def _triton_kernels(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, deterministic: bool
) -> KernelChoice:
    """Return which of our own kernels run on a GPU."""
    import triton  # absent on most CPUs

    reason = remedy = ""
    if capability[0] != support.COMPUTE_CAPABILITY:
        major, minor = capability
        reason = f"the kernels for Hopper need compute capability {support.COMPUTE_CAPABILITY}.x, not {major}.{minor}"
    elif obstacle := support.release_obstacle(triton.__version__):
        reason, remedy = obstacle, support.REMEDY
    elif dtype not in _HALF_DTYPES:
        reason, remedy = f"the kernels for Hopper take bfloat16 and float16, not {dtype}", "train in bfloat16"
    elif head_dim not in support.BACKWARD_DIMS:
        reason = f"the kernels for Hopper take head dims {support.BACKWARD_DIMS}, not {head_dim}"
    if reason:
        return KernelChoice("triton", "portable", "portable", reason, remedy)
    forward = "hopper" if head_dim in support.FORWARD_DIMS else "portable"
    if deterministic:
        reason = "the backward kernel for Hopper cannot promise deterministic gradients"
        return KernelChoice("triton", forward, "portable", reason)
    return KernelChoice("triton", forward, "hopper")


def _by_speed(device: torch.device) -> tuple[str, ...]:
    """Return the backends that ``"auto"`` tries, the fastest first."""
    return ("sdpa",) if device.type == "cpu" else ("triton", "flash")


def _fastest(device: torch.device, dtype: torch.dtype, deterministic: bool) -> Kernel:
    for backend in _by_speed(device):
        reason = _obstacle(backend, device, dtype, deterministic)
        if not reason:
            return _kernel(backend)
        log_once(f"dilated attention passes over backend {backend!r}: it {reason}")
    return _kernel("reference")


def _obstacle(backend: str, device: torch.device, dtype: torch.dtype, deterministic: bool) -> str:
    """Return why ``backend`` cannot run, or an empty string."""
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
    if dtype not in _HALF_DTYPES:
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
