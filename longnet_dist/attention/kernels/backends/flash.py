"""Dense attention kernels of others on strided views: flash-attn 4 where it is installed, else the one of torch.

A view is one batch of dense problems whose rows are ``r`` apart (``views.py``). The backward kernels take the merged
output and LSE, which makes the gradient of the mixture exact. The symbols are those of
:mod:`longnet_dist.attention.kernels.contract`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from longnet_dist import private_interfaces
from longnet_dist.attention.kernels.backends import BACKENDS, Backend
from longnet_dist.attention.kernels.contract import (
    BackwardInputs,
    Call,
    Gradients,
    Kernel,
    WideAccumulation,
    with_lse_gradient,
)
from longnet_dist.attention.kernels.views import dense_problems, views

MOST_PROBLEMS = 65_535  # the batch is a grid dimension of most flash kernels (flash-attention#1786)


@BACKENDS.register("flash")
class FlashBackend(Backend):
    """Dense flash kernels of others, the second on a GPU."""

    @staticmethod
    def rank(device_type: str) -> int | None:
        """Return 20 on a GPU, behind the kernels of our own."""
        return 20 if device_type == "cuda" else None

    @staticmethod
    def obstacle(device: torch.device, dtype: torch.dtype, deterministic: bool) -> str:
        """Say what is missing: a GPU, half precision, or determinism."""
        if device.type != "cuda":
            return f"runs on a GPU, but the tensors are on {device}"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"takes bfloat16 and float16, not {dtype}"
        return "cannot promise deterministic gradients" if deterministic else ""

    @staticmethod
    def kernel() -> Kernel:
        """Make the kernel with flash-attn 4 where it is installed, else with torch's FlashAttention-2."""
        return FlashKernel(find_engine())


class Engine(Protocol):
    """Compute dense attention: tensors ``(batch, rows, heads, D)`` of any stride, lse ``(batch, heads, rows)``."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Return ``(out, lse)`` of the softmax over these keys alone."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
        deterministic: bool,
    ) -> tuple[Tensor, ...]:
        """Return ``(dq, dk, dv)`` for an ``out`` and ``lse`` that may be of a softmax over more keys."""


class FlashAttention4:
    """Call flash-attn 4 (CuTe DSL; Hopper and Blackwell) through the functions beneath its autograd Function."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Return ``(out, lse)`` as :meth:`Engine.forward`."""
        flash_forward, _ = private_interfaces.flash_4()  # compiles at import: only where it is used
        out, lse, *_ = flash_forward(q, k, v, softmax_scale=scale, causal=causal, return_lse=True)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
        deterministic: bool,
    ) -> tuple[Tensor, ...]:
        """Return ``(dq, dk, dv)`` as :meth:`Engine.backward`."""
        _, flash_backward = private_interfaces.flash_4()
        return tuple(
            flash_backward(
                q, k, v, out, dout, lse.contiguous(), softmax_scale=scale, causal=causal, deterministic=deterministic
            )
        )


class TorchFlash:
    """Call FlashAttention-2 as torch carries it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Return ``(out, lse)`` as :meth:`Engine.forward`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        flash_forward, _ = private_interfaces.gpu_flash()
        out, lse, *_ = flash_forward(q, k, v, 0.0, causal, scale=scale)
        return out.transpose(1, 2), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
        deterministic: bool,
    ) -> tuple[Tensor, ...]:
        """Return ``(dq, dk, dv)`` as :meth:`Engine.backward`."""
        queries, keys = q.shape[1], k.shape[1]
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that is off
        _, flash_backward = private_interfaces.gpu_flash()
        parts = flash_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, queries, keys, 0.0, causal, unused, unused, scale=scale
        )
        return tuple(part.transpose(1, 2) for part in parts)


class FlashKernel(WideAccumulation):
    """Merge the engine's results by their softmax denominators, in float32."""

    name = "flash"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge the keys of the piece into the running ``(out, lse)``."""
        for (q_, out_, lse_), (k_, v_), causal in _problems(call, (q, out, lse), (k, v)):
            part, part_lse = self.engine.forward(q_, k_, v_, causal, call.scale)
            part_lse = part_lse.transpose(1, 2)
            # LSE'' = ln(exp LSE + exp LSE').
            merged = torch.logaddexp(lse_, part_lse)
            # O'' = exp(LSE - LSE'') O + exp(LSE' - LSE'') O'.
            out_.mul_((lse_ - merged).exp_()[..., None]).addcmul_(part, (part_lse - merged).exp_()[..., None])
            lse_.copy_(merged)

    def backward(self, call: Call, given: BackwardInputs, sums: Gradients) -> None:
        """Add the piece's part of dQ, dK and dV."""
        dout, q, k, v, (out, lse, *dlse) = given
        dq, dk, dv = sums
        for queries, keys, causal in _problems(call, (dout, q, out, lse, dq, *dlse), (k, v, dk, dv)):
            (dout_, q_, out_, lse_, dq_, *dlse_), (k_, v_, dk_, dv_) = queries, keys
            if dlse_:  # kernels of a GPU take head dims that are multiples of 8
                dout_, q_, k_, v_, out_ = with_lse_gradient((dout_, q_, k_, v_, out_), dlse_[0], 8)
            # The engine computes P = exp(s - LSE) and delta = rowsum(dO ∘ O). From the merged LSE and O these are those
            # of the softmax over all branches, so its results are this view's parts of dQ, dK and dV.
            parts = self.engine.backward(
                dout_, q_, k_, v_, out_, lse_.transpose(1, 2), causal, call.scale, call.deterministic
            )
            for total, part in zip((dq_, dk_, dv_), parts, strict=True):
                total.add_(part[..., : total.shape[-1]])


def find_engine() -> Engine:
    """Return flash-attn 4 if it is installed and supports the device, else torch's FlashAttention-2."""
    modern = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)
    if modern and importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
        return FlashAttention4()
    return TorchFlash()


def _problems(
    call: Call, query_buffers: tuple[Tensor, ...], key_buffers: tuple[Tensor, ...]
) -> Iterator[tuple[list[Tensor], list[Tensor], bool]]:
    """Yield the dense problems of a piece, at most :data:`MOST_PROBLEMS` at a time."""
    for view in views(call):
        for queries, keys, causal in dense_problems(view, query_buffers, key_buffers):
            for start in range(0, len(keys[0]), MOST_PROBLEMS):
                part = slice(start, start + MOST_PROBLEMS)
                yield [x[part] for x in queries], [x[part] for x in keys], causal
