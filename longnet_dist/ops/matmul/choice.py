"""Products of rows and weights, with the norm that comes before them and the sum that comes behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longnet_dist.attention.kernels.registry import takes_triton
from longnet_dist.errors import ConfigError
from longnet_dist.numerics import log_once

ProductsName = Literal["auto", "torch", "quack"]
Normed = tuple[Tensor, ...]
"""Normed rows, in the form that the products take: alone, or rows that are not normed and the moments of their norm."""
FEWEST_ROWS = 4096
"""In a pass over fewer rows it does not pay to fold the norms' weights."""


class Products(NamedTuple):
    """Functions of rows ``x (n, K)``; those without ``write`` may be compiled.

    Attributes:
        normed: ``(x, weight, bias, eps)`` to :data:`Normed`, for ``linear``; weight and bias of the norm, or neither.
        linear: ``(rows, weight, bias, added)`` to ``rows weightᵀ + bias + added (n, N)``, or without the last.
        write_linear: the same into ``out``, which may be ``added``: ``(rows, weight, bias, added, out)``.
        product: ``(x, weight (K, N))`` to ``x weight (n, N)``.
        write_rotated: ``rows weightᵀ + bias``, as heads that are rotated by a table ``(n, 1, D/2, 2)`` of
            :class:`~longnet_dist.attention.positions.RotaryTable`, into ``out``: ``(rows, weight, bias, table, out)``.
        rotated_dims: the head dims that it knows.
        folded: whether the norms' own weights must have been folded into the maps behind them.
    """

    normed: Callable[[Tensor, Tensor | None, Tensor | None, float], Normed]
    linear: Callable[[Normed, Tensor, Tensor, Tensor | None], Tensor]
    write_linear: Callable[[Normed, Tensor, Tensor, Tensor | None, Tensor], None]
    product: Callable[[Tensor, Tensor], Tensor]
    write_rotated: Callable[[Normed, Tensor, Tensor, Tensor, Tensor], None]
    rotated_dims: tuple[int, ...]
    folded: bool


def _normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Normed:
    return (F.layer_norm(x, x.shape[-1:], weight, bias, eps),)


def _linear(rows: Normed, weight: Tensor, bias: Tensor, added: Tensor | None) -> Tensor:
    y = F.linear(rows[0], weight, bias)
    return y if added is None else added + y


def _write_linear(rows: Normed, weight: Tensor, bias: Tensor, added: Tensor | None, out: Tensor) -> None:
    if added is None:
        torch.addmm(bias, rows[0], weight.T, out=out)
    elif added is out:
        out.add_(_linear(rows, weight, bias, None))
    else:
        out.copy_(_linear(rows, weight, bias, added))


def _write_turned(rows: Normed, weight: Tensor, bias: Tensor, table: Tensor, out: Tensor) -> None:
    raise NotImplementedError("rotated_dims has none")


TORCH = Products(_normed, _linear, _write_linear, torch.matmul, _write_turned, (), folded=False)
"""torch's products, and norms that its compiler makes kernels of."""


def products_of(
    name: ProductsName, device: torch.device, dtype: torch.dtype, rows: int, widths: tuple[int, ...]
) -> Products:
    """The products for a pass over ``rows`` rows, whose lengths are among ``widths``.

    ``"auto"`` takes those of quack (``longnet_dist/ops/matmul/quack.py``) where they run: in bfloat16 and float16
    on a Hopper GPU, with the package installed; that it is missing is logged once. Fewer than :data:`FEWEST_ROWS` rows
    take torch's.

    Raises:
        ConfigError: ``"quack"`` where they do not run.
    """
    if name == "torch" or rows < FEWEST_ROWS:
        return TORCH
    obstacle = _obstacle(device, dtype, widths)
    found = obstacle or _quack()
    if isinstance(found, Products):
        return found
    if name == "quack":
        raise ConfigError(f"train.products=quack {found}; use train.products=auto")
    if not obstacle:
        log_once(f"blocks take torch's products of rows and weights: train.products=quack {found}")
    return TORCH


@lru_cache(maxsize=1)
def _quack() -> Products | str:
    """quack's products, or why they cannot be had."""
    try:
        from longnet_dist.ops.matmul import quack as quack_products
    except ImportError as error:
        return f"needs the package quack-kernels, pip install 'longnet-dist[cuda]' ({error})"
    return Products(*quack_products.FUNCTIONS, folded=True)


def _obstacle(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str:
    """Why quack's products cannot run on the device or the rows, or an empty string."""
    if not takes_triton(device, dtype) or torch.cuda.get_device_capability(device)[0] != 9:
        return f"runs on a Hopper GPU, not on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    if any(width % 8 for width in widths):
        return f"takes rows of a multiple of 8 numbers, not of {', '.join(map(str, widths))}"
    return ""
