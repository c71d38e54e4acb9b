"""Exact dense causal attention over ranks, as a user would have it instead: two ways, forward and backward.

Both take this rank's share of a causal sequence, ``(1, H, N / P, D)``, and compute with cuDNN where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Run = Callable[[], Any]


class _Swap(torch.autograd.Function):
    """All-to-all of equal parts of the first dim; its backward is itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Swap.apply(gradient.contiguous(), ctx.group), None


@contextmanager
def ulysses(group: dist.ProcessGroup, rows: int, heads: int, dim: int, like: Tensor) -> Iterator[Run]:
    """DeepSpeed-Ulysses (arXiv 2309.14509): all-to-all to all rows of ``H / P`` heads, attention, all-to-all back."""
    ranks = dist.get_world_size(group)
    q, k, v, dout = (torch.randn(1, rows // ranks, heads, dim, **_kind(like)) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def heads_apart(x: Tensor) -> Tensor:  # (1, n, H, D) to (1, H / P, N, D)
        parts = x[0].unflatten(1, (ranks, heads // ranks)).transpose(0, 1).contiguous()
        return _Swap.apply(parts, group).flatten(0, 1).transpose(0, 1)[None]

    def rows_apart(x: Tensor) -> Tensor:  # and back
        parts = x[0].transpose(0, 1).unflatten(0, (ranks, rows // ranks)).contiguous()
        return _Swap.apply(parts, group).transpose(0, 1).flatten(1, 2)[None]

    def run() -> Any:
        with _backend(like.device):
            q, k, v = map(heads_apart, leaves)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return torch.autograd.grad(rows_apart(out), leaves, dout)

    yield run


@contextmanager
def ring(group: dist.ProcessGroup, rows: int, heads: int, dim: int, like: Tensor) -> Iterator[Run]:
    """torch's ``context_parallel``, with its load balance of causal attention, its default."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = DeviceMesh.from_group(group, like.device.type)
    q, k, v, dout = (torch.randn(1, heads, rows, dim, **_kind(like)) for _ in range(4))  # it wants them whole
    buffers, leaves = [q, k, v, dout], [q, k, v]
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 4, no_restore_buffers=set(buffers)):
        for x in leaves:
            x.requires_grad_()

        def run() -> Any:
            with _backend(like.device):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # context_parallel has replaced it
                return torch.autograd.grad(out, leaves, dout)

        yield run
        for x in leaves:
            x.requires_grad_(False)


PEERS = {"Ulysses": ulysses, "context_parallel": ring}


def _kind(like: Tensor) -> dict[str, Any]:
    return {"device": like.device, "dtype": like.dtype}


def _backend(device: torch.device) -> Any:
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device.type == "cuda" else nullcontext()
