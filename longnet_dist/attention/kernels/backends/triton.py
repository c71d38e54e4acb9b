"""The backend of our own GPU kernels (``attention/kernels/triton``, ``attention/kernels/hopper``)."""

from __future__ import annotations

import importlib.util
import os

import torch

from longnet_dist.attention.kernels.backends import BACKENDS, Backend, KernelChoice
from longnet_dist.attention.kernels.contract import Kernel
from longnet_dist.attention.kernels.hopper import support

_GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HALF_DTYPES = (torch.bfloat16, torch.float16)


def has_triton() -> bool:
    """Say whether Triton is installed; it is absent on most CPUs."""
    return importlib.util.find_spec("triton") is not None


@BACKENDS.register("triton")
class TritonBackend(Backend):
    """The fastest on a GPU (benchmarks/results/attention_kernels.md); on a CPU only Triton's interpreter runs it."""

    merges_overlaps = True

    @staticmethod
    def rank(device_type: str) -> int | None:
        return 10 if device_type == "cuda" else None

    @staticmethod
    def obstacle(device: torch.device, dtype: torch.dtype, deterministic: bool) -> str:
        if device.type == "cpu":
            if os.environ.get("TRITON_INTERPRET") == "1" and dtype == torch.float32 and has_triton():
                return ""
            return "runs on a CPU only in float32 in Triton's interpreter (TRITON_INTERPRET=1)"
        if device.type != "cuda":
            return f"runs on a GPU, but the tensors are on {device}"
        if not has_triton():
            return "needs the package triton"
        return "" if dtype in _GPU_DTYPES else f"takes bfloat16, float16 and float32, not {dtype}"

    @staticmethod
    def kernel() -> Kernel:
        from longnet_dist.attention.kernels.triton.kernel import TritonKernel

        return TritonKernel()

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
        if device.type != "cuda":
            return KernelChoice(name, name, name)
        import triton

        major, minor = capability or torch.cuda.get_device_capability(device)
        reason = remedy = ""
        if major != support.COMPUTE_CAPABILITY:
            needed = support.COMPUTE_CAPABILITY
            reason = f"the kernels for Hopper need compute capability {needed}.x, not {major}.{minor}"
        elif obstacle := support.release_obstacle(triton.__version__):
            reason, remedy = obstacle, support.REMEDY
        elif dtype not in _HALF_DTYPES:
            reason, remedy = f"the kernels for Hopper take bfloat16 and float16, not {dtype}", "train in bfloat16"
        elif head_dim not in support.BACKWARD_DIMS:
            reason = f"the kernels for Hopper take head dims {support.BACKWARD_DIMS}, not {head_dim}"
        elif tables and not support.TABLES:
            reason = "the kernels for Hopper take segments of one length and all heads of a model"
        if reason:
            return KernelChoice(name, "portable", "portable", reason, remedy)
        forward = "hopper" if head_dim in support.FORWARD_DIMS and not (tables and deterministic) else "portable"
        if deterministic:
            reason = "the kernel for Hopper adds dQ in no fixed order, so that dQ is computed on its own"
            if tables:
                reason = "a document must be bitwise what it is alone, and the kernels for Hopper do not promise that"
            return KernelChoice(name, forward, "portable", reason)
        return KernelChoice(name, forward, "hopper")
