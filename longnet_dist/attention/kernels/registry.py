"""The one place where a backend is chosen; the folder ``backends`` has one file for each."""

from __future__ import annotations

import torch

from longnet_dist.attention.kernels.backends import BACKENDS, KernelChoice
from longnet_dist.attention.kernels.backends.triton import TritonBackend, has_triton
from longnet_dist.attention.kernels.contract import Kernel
from longnet_dist.caches import bounded_cache
from longnet_dist.errors import ConfigError
from longnet_dist.numerics import log_once

AUTO = "auto"


def choose_kernel(backend: str, device: torch.device, dtype: torch.dtype, deterministic: bool = False) -> Kernel:
    """Return the kernel of ``backend``; ``"auto"`` takes the fastest that runs on the device.

    Backends rank themselves: on a GPU (benchmarks/results/attention_kernels.md) ``triton``, then ``flash``, on a CPU
    ``sdpa``, then ``reference``. Why one is passed over is logged once.

    Raises:
        ConfigError: an unknown backend, or one that cannot run on the device, in the dtype or deterministically.
    """
    name, passed_over = _choose(backend, device, dtype, deterministic)
    for other, obstacle in passed_over:
        log_once(f"dilated attention passes over backend {other!r}: it {obstacle}")
    return _kernel(name)


def check_backend(backend: str, device: torch.device, dtype: torch.dtype, deterministic: bool = False) -> None:
    """Refuse a backend before the ranks meet; arguments and errors of :func:`choose_kernel`."""
    _choose(backend, device, dtype, deterministic)


def describe_kernels(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    backend: str = AUTO,
    deterministic: bool = False,
    capability: tuple[int, int] | None = None,
    tables: bool = False,
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
        tables: whether segments are of unequal lengths (documents, padding, shifted grids), or the call holds some
            heads of a model.

    Raises:
        ConfigError: an unknown backend, or one that cannot run on the device, in the dtype or deterministically.
    """
    name, passed_over = _choose(backend, device, dtype, deterministic)
    if passed_over:
        remedy = "install triton" if device.type == "cuda" and not has_triton() else ""
        reason = "; ".join(f"backend {other!r} {obstacle}" for other, obstacle in passed_over)
        return KernelChoice(name, name, name, reason, remedy)
    return BACKENDS[name].describe(name, device, dtype, head_dim, deterministic, capability, tables)


def _choose(
    backend: str, device: torch.device, dtype: torch.dtype, deterministic: bool
) -> tuple[str, list[tuple[str, str]]]:
    """Return the name of a backend, and faster ones with the reason why each is passed over."""
    if backend != AUTO:
        BACKENDS.check(backend, "backend", AUTO)
        if obstacle := BACKENDS[backend].obstacle(device, dtype, deterministic):
            raise ConfigError(f"backend {backend!r} {obstacle}; use 'auto'")
        return backend, []
    passed_over: list[tuple[str, str]] = []
    for name in _by_rank(device.type):
        obstacle = BACKENDS[name].obstacle(device, dtype, deterministic)
        if not obstacle:
            return name, passed_over
        passed_over.append((name, obstacle))
    raise ConfigError(f"no backend runs on {device} in {dtype}: {dict(passed_over)}; use a CPU or a GPU")


def _by_rank(device_type: str) -> list[str]:
    """Return the backends that ``"auto"`` tries, the fastest first."""
    ranks = ((BACKENDS[name].rank(device_type), name) for name in BACKENDS.names())
    return [name for _, name in sorted((rank, name) for rank, name in ranks if rank is not None)]


@bounded_cache(maxsize=16)
def _kernel(backend: str) -> Kernel:
    return BACKENDS[backend].kernel()


def takes_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether kernels of our own for row-wise work run there: on GPUs."""
    return device.type == "cuda" and not TritonBackend.obstacle(device, dtype, deterministic=False)
