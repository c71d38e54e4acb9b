"""The attention kernel that torch carries for CPUs, on strided views: no copy of the sequence, linear memory.

The symbols are those of :mod:`longnet_dist.attention.kernels.contract`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longnet_dist.attention.kernels.backends import BACKENDS, Backend
from longnet_dist.attention.kernels.contract import (
    BackwardInputs,
    Call,
    Gradients,
    Kernel,
    WideAccumulation,
    with_lse_gradient,
)
from longnet_dist.attention.kernels.views import View, dense_problems, views
from longnet_dist.private_interfaces import cpu_flash

_forward, _backward = cpu_flash()
_BLOCK_ELEMENTS = 1 << 22


@BACKENDS.register("sdpa")
class SdpaBackend(Backend):
    """The fastest on a CPU."""

    @staticmethod
    def rank(device_type: str) -> int | None:
        return 10 if device_type == "cpu" else None

    @staticmethod
    def obstacle(device: torch.device, dtype: torch.dtype, deterministic: bool) -> str:
        return "" if device.type == "cpu" else f"runs on the CPU, but the tensors are on {device}"

    @staticmethod
    def kernel() -> Kernel:
        return SdpaKernel()


class SdpaKernel(WideAccumulation):
    """Compute each view by one call of torch's flash attention for CPUs.

    Its backward takes the merged output and LSE, which makes the gradient of the mixture exact.
    """

    name = "sdpa"

    def forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge the keys of the piece into the running ``(out, lse)``."""
        for view in _blocks(call, q.shape[3]):
            for queries, keys, causal in dense_problems(view, (q, out, lse), (k, v)):
                (q_, out_, lse_), (k_, v_) = _heads_first(queries), _heads_first(keys)
                part, part_lse = _forward(q_, k_, v_, is_causal=causal, scale=call.scale)  # O', LSE'
                # LSE'' = ln(exp LSE + exp LSE').
                merged = torch.logaddexp(lse_, part_lse)
                # O'' = exp(LSE - LSE'') O + exp(LSE' - LSE'') O'.
                out_.mul_((lse_ - merged).exp_()[..., None]).add_(part * (part_lse - merged).exp_()[..., None])
                lse_.copy_(merged)

    def backward(self, call: Call, given: BackwardInputs, sums: Gradients) -> None:
        """Add the piece's part of dQ, dK and dV."""
        dout, q, k, v, (out, lse, *dlse) = given
        dq, dk, dv = sums
        for view in _blocks(call, q.shape[3]):
            for queries, keys, causal in dense_problems(view, (dout, q, out, lse, dq, *dlse), (k, v, dk, dv)):
                (dout_, q_, out_, lse_, dq_, *dlse_), (k_, v_, dk_, dv_) = _heads_first(queries), _heads_first(keys)
                if dlse_:
                    dout_, q_, k_, v_, out_ = with_lse_gradient((dout_, q_, k_, v_, out_), dlse_[0], 1)
                # torch computes P = exp(s - LSE) and delta = rowsum(dO ∘ O) from the LSE and O that it is given. Given
                # the merged ones, its results are these keys' parts of the whole softmax's gradients.
                parts = _backward(dout_, q_, k_, v_, out_, lse_, 0.0, causal, scale=call.scale)
                for total, part in zip((dq_, dk_, dv_), parts, strict=True):
                    total.add_(part[..., : total.shape[-1]])


def _blocks(call: Call, head_dim: int) -> Iterator[View]:
    """Cut views of many segments, so that the memory of the kernel's results is used again and again.

    Fresh memory costs a page fault every 4 KiB: 15 % of the time of a long sequence.
    """
    for view in views(call):
        elements = view.queries * len(range(*view.heads.indices(len(call.offsets)))) * head_dim
        yield from view.split(max(1, _BLOCK_ELEMENTS // elements))


def _heads_first(tensors: list[Tensor]) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]
