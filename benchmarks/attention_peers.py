"""The kernels of others that benchmarks/attention.py measures: dense ones, and torchscale's dilated attention."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.private_interfaces import gpu_flash

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense_kernels(causal: bool) -> dict[str, Attend]:
    """Dense attention of ``(B, N, H, D)`` tensors, by the name of the kernel: those of torch, and of flash-attn 3 and 4
    where they are installed."""
    kernels: dict[str, Attend] = {
        "cuDNN": partial(_of_torch, SDPBackend.CUDNN_ATTENTION, causal),
        "FlashAttention-2": partial(_of_torch, SDPBackend.FLASH_ATTENTION, causal),
    }
    if importlib.util.find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_func as third

        kernels["FlashAttention-3"] = lambda q, k, v: _first(third(q, k, v, causal=causal))
    if importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
        from flash_attn.cute import flash_attn_func as fourth

        kernels["flash-attn 4"] = lambda q, k, v: _first(fourth(q, k, v, causal=causal))
    return kernels


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _of_torch(kernel: SDPBackend, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(kernel):
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def torchscale_attention(checkout: Path, pattern: DilatedPattern, heads: int, dim: int, causal: bool) -> Attend:
    """torchscale's ``DilatedAttention`` without its projections, for ``(B, N, H, D)`` tensors.

    Its attention kernel is flash-attn 2, or, where that is not installed, the same kernel as torch carries it.
    """
    sys.path.insert(0, str(checkout))
    from torchscale.component import multihead_attention
    from torchscale.component.dilated_attention import DilatedAttention

    if multihead_attention.flash_attn_func is None:
        multihead_attention.flash_attn_func = _flash_with_lse
    options = SimpleNamespace(
        flash_attention=True,
        segment_length=list(pattern.segment_lengths),
        dilated_ratio=list(pattern.dilation_rates),
        seq_parallel=False,
        xpos_rel_pos=False,
        multiway=False,
        layernorm_eps=1e-5,
    )
    module = DilatedAttention(options, heads * dim, heads, self_attention=True)
    module.dropout = 0.0
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        setattr(module, name, nn.Identity())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module(*(x.flatten(2) for x in (q, k, v)), is_causal=causal)[0]
        return out.view(q.shape)

    return attend


def _flash_with_lse(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, bias: None, scale: float | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """The signature that torchscale gives flash-attn 2's function."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    flash_forward, _ = gpu_flash()
    out, lse, *_ = flash_forward(q, k, v, dropout, causal, scale=scale)
    return out.transpose(1, 2), lse
