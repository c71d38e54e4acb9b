"""The backend that is written to be read, for any device and dtype (``attention/kernels/reference.py``)."""

from __future__ import annotations

from longnet_dist.attention.kernels.backends import BACKENDS, Backend
from longnet_dist.attention.kernels.contract import Kernel
from longnet_dist.attention.kernels.reference import ReferenceKernel


@BACKENDS.register("reference")
class ReferenceBackend(Backend):
    """Whole score matrices in plain tensor algebra: what is left where nothing else runs."""

    @staticmethod
    def rank(device_type: str) -> int:
        return 100

    @staticmethod
    def kernel() -> Kernel:
        return ReferenceKernel()
