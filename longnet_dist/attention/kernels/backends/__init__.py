"""Backends of dilated attention (``backend``), each in a file of its own.

A backend registers a class with the methods of :class:`Backend` under its name. Its kernel keeps the contract of
``attention/kernels/contract.py``::

    @BACKENDS.register("mine")
    class Mine(Backend):
        @staticmethod
        def rank(device_type):
            return 5 if device_type == "cpu" else None

        @staticmethod
        def kernel():
            return MyKernel()

A file is imported when ``"auto"`` looks for the fastest backend. So it imports packages that may be missing only inside
``kernel``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from longnet_dist.registry import ATTENTION_BACKENDS, Registry

if TYPE_CHECKING:
    from longnet_dist.attention.kernels.contract import Kernel


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The kernels that a call of dilated attention runs.

    Attributes:
        backend: a name of ``BACKENDS``.
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


class Backend:
    """Say where a backend runs, how fast it is among others, and which kernel it has.

    Attributes:
        merges_overlaps: as of its kernel; the planner, which makes no kernel, asks here.
    """

    merges_overlaps: bool = False

    @staticmethod
    def rank(device_type: str) -> int | None:
        """Return the place among the backends that ``"auto"`` tries, the lowest first; None: it is not tried there.

        Args:
            device_type: ``"cuda"`` or ``"cpu"``.
        """
        raise NotImplementedError

    @staticmethod
    def obstacle(device: torch.device, dtype: torch.dtype, deterministic: bool) -> str:
        """Say why the backend cannot run, as ``"takes bfloat16, not float32"``; an empty string where it can.

        Args:
            device: of the tensors.
            dtype: of the tensors.
            deterministic: whether the gradients must be bitwise equal from run to run.
        """
        return ""

    @staticmethod
    def kernel() -> Kernel:
        """Make the kernel; it is made once in a process."""
        raise NotImplementedError

    @classmethod
    def describe(
        cls,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        deterministic: bool,
        capability: tuple[int, int] | None,
        tables: bool,
    ) -> KernelChoice:
        """Say which kernels a call gets that the backend can run; arguments of ``registry.describe_kernels``."""
        return KernelChoice(name, name, name)


BACKENDS: Registry[type[Backend]] = ATTENTION_BACKENDS
