"""The contract of an attention kernel: one piece at a time, on a running result.

Buffers, with the shape legend of the package:

* ``q``, ``dout``, ``dq``: ``(B, n, H, D)``, the rows of the window; ``lse``: ``(B, n, H)``.
* ``k``, ``v``, ``dk``, ``dv``: ``(B, rows, Hkv, D)``, the window's rows, or a segment's compact buffer.
* All may be strided views; only ``D`` is contiguous.
* The running ``out`` has the accumulator dtype that the kernel asks for, ``lse`` is float32 (float64 for
  float64 inputs), natural logarithm; a row and head without keys so far has ``out = 0`` and ``lse = -inf``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from longnet_dist.geometry.window import Piece
from longnet_dist.numerics import wide_dtype


@dataclass(frozen=True, slots=True)
class Call:
    """What is the same for all rows of a piece.

    Attributes:
        piece: rows, segments and where the keys stand.
        offsets: offset of each key/value head in this branch.
        causal: whether a query sees only keys of index up to its own.
        scale: factor of the scores.
        deterministic: whether the gradients must be bitwise equal from run to run.
        fresh: whether the running result, in backward ``dk`` and ``dv``, were never written and the piece covers all of
            them, so that the kernel writes where it would add. Only for kernels with ``starts_fresh``.
    """

    piece: Piece
    offsets: tuple[int, ...]
    causal: bool
    scale: float
    deterministic: bool = False
    fresh: bool = False


SoftmaxStatistics = tuple[Tensor, ...]
"""What a kernel's backward is to know of the merged output, in its own form."""


class BackwardInputs(NamedTuple):
    """What the backward of a piece reads; ``statistics`` are what ``start_backward`` gave."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    statistics: SoftmaxStatistics


class Gradients(NamedTuple):
    """What it adds to."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


class Kernel(Protocol):
    """A backend of dilated attention.

    Attributes:
        name: as ``backend`` of ``dilated_attention``.
        starts_fresh: whether the first call may find buffers that were never written (``Call.fresh``).
        merges_overlaps: whether it takes pieces of which other branches compute a part (``Piece.half, overlap_rates``).
    """

    name: str
    starts_fresh: bool
    merges_overlaps: bool

    def accumulator_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype in which the running ``out`` is kept for inputs of ``dtype``."""

    def gradient_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """Dtypes of ``dq``, and of ``dk`` and ``dv``, for inputs of ``dtype``; ``dk, dv`` may come wider."""

    def forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Add the keys of the piece to the running ``(out, lse)``, in place."""

    def start_backward(
        self,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        scratch: Tensor | None = None,
        delta: Tensor | None = None,
        dlse: Tensor | None = None,
    ) -> SoftmaxStatistics:
        """What ``backward`` is to know of the *merged* ``out`` and ``lse``, which the caller then forgets.

        Clears ``dq``. ``scratch`` is a contiguous buffer of
        ``out``'s shape and dtype that nobody needs before the last call of ``backward``: the result may stand there.
        ``delta = rowsum(dO ∘ O) - dlse (B, n, H)``, like ``lse``, if the caller has it already. ``dlse``, if the
        log-sum-exp has a gradient, is for kernels that compute delta on their own; ``delta`` is then given, too.
        """

    def backward(self, call: Call, given: BackwardInputs, sums: Gradients) -> None:
        """Add the piece's part of the gradients to ``sums``, in place.

        ``P_ij = exp(scale·q_i·k_j - lse_i)``, ``dV = Pᵀ dO``, ``dS = P ∘ (dO Vᵀ - delta)``, ``dQ = scale·dS K``,
        ``dK = scale·dSᵀ Q`` with ``delta = rowsum(dO ∘ O) - dlse``.
        """


class WideAccumulation:
    """The part of the contract that is plain tensor algebra: sums in float32 or wider, in cleared buffers."""

    starts_fresh = False
    merges_overlaps = False

    def accumulator_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return wide_dtype(dtype)

    def gradient_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        return wide_dtype(dtype), wide_dtype(dtype)

    def start_backward(
        self,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        scratch: Tensor | None = None,
        delta: Tensor | None = None,
        dlse: Tensor | None = None,
    ) -> SoftmaxStatistics:
        dq.zero_()
        return (out, lse) if dlse is None else (out, lse, dlse)


def with_lse_gradient(tensors: Sequence[Tensor], dlse: Tensor, columns: int) -> list[Tensor]:
    """Return ``dout, q, k, v, out`` with more columns, so that a kernel that computes delta counts ``dlse``.

    With a column 1 more of the values, ``dlse`` in that of ``dout`` and 0 in that of ``out``, dO Vᵀ grows by dlse while
    rowsum(dO ∘ O) stays: dS = P ∘ (dO Vᵀ + dlse - delta). Columns of 0 in queries and keys leave the scores.

    Args:
        tensors: ``(…, D)`` each.
        dlse: as ``dout`` without its last dimension.
        columns: how many columns; the others are 0. The caller cuts them off the gradients.
    """
    dout, q, k, v, out = (torch.nn.functional.pad(x, (0, columns)) for x in tensors)
    dout[..., -columns] = dlse
    v[..., -columns] = 1
    return [dout, q, k, v, out]
