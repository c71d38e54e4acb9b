"""Matmuls of tokens and weights, fused with the norm before them and the sum behind them where a backend can."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from longnet_dist.attention.kernels.registry import takes_triton
from longnet_dist.caches import bounded_cache
from longnet_dist.errors import ConfigError
from longnet_dist.numerics import log_once
from longnet_dist.ops.matmul import reference

MatmulName = Literal["auto", "torch", "quack"]
Normed = tuple[Tensor, ...]
"""Normed tokens in the form that a backend takes: normed, or not normed with the moments of their norm."""
FEWEST_ROWS = 4096
"""In a pass over fewer tokens it does not pay to fold the norms' weights."""


class Matmul(NamedTuple):
    """Hold a backend's functions of tokens ``x (n, K)``, of which those without ``write`` may be compiled.

    Attributes:
        normed: ``(x, weight, bias, eps)`` to :data:`Normed`, for ``linear``; weight and bias of the norm, or neither.
        linear: ``(tokens, weight, bias, added)`` to ``tokens weightᵀ + bias + added (n, N)``; ``added`` may be None.
        write_linear: the same into ``out``, which may be ``added``: ``(tokens, weight, bias, added, out)``.
        matmul: ``(x, weight (K, N))`` to ``x weight (n, N)``.
        write_rotated: ``tokens weightᵀ + bias`` as heads, rotated by a table ``(n, 1, D/2, 2)`` of a
            :class:`~longnet_dist.attention.positions.RotaryTable`, into ``out``:
            ``(tokens, weight, bias, table, out)``.
        rotated_dims: the head dims that ``write_rotated`` takes.
        folded: whether the norms' weights must have been folded into the linear layers behind them.
    """

    normed: Callable[[Tensor, Tensor | None, Tensor | None, float], Normed]
    linear: Callable[[Normed, Tensor, Tensor, Tensor | None], Tensor]
    write_linear: Callable[[Normed, Tensor, Tensor, Tensor | None, Tensor], None]
    matmul: Callable[[Tensor, Tensor], Tensor]
    write_rotated: Callable[[Normed, Tensor, Tensor, Tensor, Tensor], None]
    rotated_dims: tuple[int, ...]
    folded: bool


REFERENCE = Matmul(
    reference.normed,
    reference.linear,
    reference.write_linear,
    torch.matmul,
    reference.write_rotated,
    reference.ROTATED_DIMS,
    folded=False,
)
"""torch's matmuls. Its compiler fuses the norms before them into kernels."""


def choose_matmul(
    name: MatmulName, device: torch.device, dtype: torch.dtype, rows: int, widths: tuple[int, ...]
) -> Matmul:
    """Return the backend for a pass over ``rows`` tokens through linear layers of ``widths`` outputs.

    ``"auto"`` takes quack's kernels where they run: in bfloat16 and float16 on a Hopper GPU, with quack-kernels
    installed. That the package is missing is logged once. Fewer than :data:`FEWEST_ROWS` tokens take torch's.

    Raises:
        ConfigError: ``"quack"`` where it does not run.
    """
    if name == "torch" or rows < FEWEST_ROWS:
        return REFERENCE
    obstacle = _obstacle(device, dtype, widths)
    found = obstacle or _quack()
    if isinstance(found, Matmul):
        return found
    if name == "quack":
        raise ConfigError(f"train.matmul=quack {found}; use train.matmul=auto")
    if not obstacle:
        log_once(f"blocks take torch's matmuls: train.matmul=quack {found}")
    return REFERENCE


def describe_matmul(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return the backend that ``"auto"`` takes in a pass over many tokens, and why it is not quack's.

    The reason is an empty string where quack's kernels run. They are imported for the answer, but not compiled.
    """
    found = _obstacle(device, dtype, ()) or _quack()
    return ("torch", found) if isinstance(found, str) else ("quack", "")


@bounded_cache(maxsize=1)
def _quack() -> Matmul | str:
    """Return quack's kernels, or why they cannot be had.

    The kernels use quack's 0.x interface as they are imported, so another release may fail there in any way.
    """
    if importlib.util.find_spec("quack") is None:
        return "needs the package quack-kernels: pip install 'longnet-dist[cuda]'"
    try:
        from longnet_dist.ops.matmul import quack as kernels
    except Exception as error:
        found = metadata.version("quack-kernels") if metadata.packages_distributions().get("quack") else "unknown"
        return (
            f"cannot use quack-kernels {found} ({type(error).__name__}: {error}); "
            f"install the release that belongs to this package: pip install 'longnet-dist[cuda]'"
        )
    return Matmul(*kernels.FUNCTIONS, folded=True)


def _obstacle(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str:
    """Return why quack's kernels cannot run on the device or the tokens, or an empty string."""
    if not takes_triton(device, dtype) or torch.cuda.get_device_capability(device)[0] != 9:
        return f"runs on a Hopper GPU, not on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    if any(width % 8 for width in widths):
        return f"takes rows of a multiple of 8 numbers, not of {', '.join(map(str, widths))}"
    return ""
