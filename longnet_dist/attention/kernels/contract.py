r"""The contract of an attention kernel: it adds one piece at a time to a running result.

Buffers, with the shape legend of the package:

* ``q``, ``dout``, ``dq``: ``(B, n, H, D)``, the rows of the window; ``lse``: ``(B, n, H)``.
* ``k``, ``v``, ``dk``, ``dv``: ``(B, rows, Hkv, D)``, the window's rows, or a segment's compact buffer.
* All may be strided views; only ``D`` is contiguous.
* The running ``out`` has the accumulator dtype that the kernel asks for, ``lse`` is float32 (float64 for
  float64 inputs), natural logarithm; a row and head without keys so far has ``out = 0`` and ``lse = -inf``.

All kernels share this algebra. Query :math:`i` has the scores :math:`s_{ij} = \mathrm{scale}·q_i^\top k_j`. The keys
that it saw so far are a multiset: a key counts once for each branch that holds it. Over them the running result is

.. math::
    \mathrm{LSE}_i = \log \sum_j e^{s_{ij}}, \qquad O_i = \sum_j e^{s_{ij} - \mathrm{LSE}_i} v_j .

A piece whose keys alone have :math:`(O', \mathrm{LSE}')` changes it by LongNet's equations 9 and 10 to

.. math::
    \mathrm{LSE}'' = \log(e^{\mathrm{LSE}} + e^{\mathrm{LSE}'}), \qquad
    O'' = e^{\mathrm{LSE} - \mathrm{LSE}''} O + e^{\mathrm{LSE}' - \mathrm{LSE}''} O' .

So the mixture of all branches is one softmax. With the final :math:`(O, \mathrm{LSE})` and
:math:`P_{ij} = e^{s_{ij} - \mathrm{LSE}_i}` its gradient is that of any softmax:

.. math::
    dV_j = \sum_i P_{ij}\, dO_i, \qquad dS_{ij} = P_{ij} (dO_i^\top v_j - δ_i), \qquad
    δ_i = \sum_j P_{ij}\, dO_i^\top v_j = dO_i^\top O_i .

Only :math:`δ` and LSE look at all keys. Given these two, each piece finds its own part of dQ, dK and dV alone. A
gradient of LSE itself joins them there: as :math:`∂\mathrm{LSE}_i/∂s_{ij} = P_{ij}`, it makes
:math:`δ_i = dO_i^\top O_i - d\mathrm{LSE}_i`.
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
    """Describe one launch: a piece and what is the same for all of its rows.

    Attributes:
        piece: its rows and segments, and where its keys are.
        offsets: offset of each key/value head in this branch.
        causal: whether a query sees only keys of index up to its own.
        scale: factor of the scores.
        deterministic: whether the gradients must be bitwise equal from run to run.
        fresh: whether the buffers were never written and the piece covers all of them, so that the kernel writes where
            it would add. In forward these are ``out`` and ``lse``, in backward ``dk`` and ``dv``. Only for kernels with
            ``starts_fresh``.
        head_block: the ``b`` with which head ``h`` has offset ``((h + c) // b) mod r``, as the rule of the offsets
            says; None if it has none.
        heads_before: the ``c`` there, 0 where this call holds all heads of a model.
    """

    piece: Piece
    offsets: tuple[int, ...]
    causal: bool
    scale: float
    deterministic: bool = False
    fresh: bool = False
    head_block: int | None = None
    heads_before: int = 0


SoftmaxStatistics = tuple[Tensor, ...]
"""The merged softmax of each query as a kernel's backward reads it: ``lse`` with ``delta``, or with ``out``."""


class BackwardInputs(NamedTuple):
    """Hold what the backward of a piece reads; ``statistics`` come from ``start_backward``."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    statistics: SoftmaxStatistics


class Gradients(NamedTuple):
    """Hold the buffers to which the backward of a piece adds."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


class Kernel(Protocol):
    """Compute dilated attention piece by piece: the interface of a backend.

    Attributes:
        name: its name as ``backend`` of ``dilated_attention``.
        starts_fresh: whether the first call may find buffers that were never written (``Call.fresh``).
        merges_overlaps: whether it takes pieces of which other branches compute a part (``Piece.half, overlap_rates``).
    """

    name: str
    starts_fresh: bool
    merges_overlaps: bool

    def accumulator_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which the running ``out`` is kept for inputs of ``dtype``."""

    def gradient_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtypes of ``dq``, and of ``dk`` and ``dv``, for inputs of ``dtype``; ``dk, dv`` may be wider."""

    def prepare(self, call: Call, q: Tensor) -> None:
        """Work out on the host what the launches of a call take long for, so that they find it; nothing is launched.

        Another thread may call it. Of the queries ``q`` only shape, dtype and device count.
        """

    def compile(self, calls: Sequence[Call], q: Tensor, k: Tensor, v: Tensor, backward: bool) -> None:
        """Compile what the calls launch, and where ``backward`` is true what their backward launches, all at once.

        It is called before the first of them, and again for other calls. Launches compile what is missing.
        """

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
        """Clear ``dq`` and return what ``backward`` needs of the *merged* ``out`` and ``lse``.

        The caller keeps neither of the two.

        Args:
            dout, out, lse, dq: the buffers, of which ``out`` and ``lse`` are final.
            scratch: a contiguous buffer of ``out``'s shape and dtype that is free until the last call of ``backward``;
                the statistics may be written there.
            delta: ``rowsum(dO ∘ O) - dlse (B, n, H)`` in the dtype of ``lse``, if the caller has it already.
            dlse: the gradient of ``lse (B, n, H)``, if it has one, for kernels that compute delta on their own;
                ``delta`` is then given, too.
        """

    def backward(self, call: Call, given: BackwardInputs, sums: Gradients) -> None:
        """Add the piece's part of the gradients to ``sums``, in place.

        ``P_ij = exp(scale·q_i·k_j - LSE_i)``, ``dV = Pᵀ dO``, ``dS = P ∘ (dO Vᵀ - delta)``, ``dQ = scale·dS K``,
        ``dK = scale·dSᵀ Q`` with ``delta = rowsum(dO ∘ O) - dlse``.
        """


class WideAccumulation:
    """Share what kernels have in common that add float32 or wider numbers to cleared buffers."""

    starts_fresh = False
    merges_overlaps = False

    def prepare(self, call: Call, q: Tensor) -> None:
        """Do nothing: a launch takes no time to work out."""

    def compile(self, calls: Sequence[Call], q: Tensor, k: Tensor, v: Tensor, backward: bool) -> None:
        """Do nothing: these kernels were compiled before."""

    def accumulator_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return float32, or float64 for float64."""
        return wide_dtype(dtype)

    def gradient_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """Return float32 for all three gradients, or float64 for float64."""
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
        """Clear ``dq``; keep the output, from which the kernels of others compute delta."""
        dq.zero_()
        return (out, lse) if dlse is None else (out, lse, dlse)


def with_lse_gradient(tensors: Sequence[Tensor], dlse: Tensor, columns: int) -> list[Tensor]:
    """Return ``dout, q, k, v, out`` with more columns, so that a kernel that computes delta counts ``dlse``.

    The new column of the values holds 1, that of ``dout`` holds ``dlse``, and the others hold 0. So dO Vᵀ grows by
    dlse, rowsum(dO ∘ O) stays, and the scores stay: ``dS = P ∘ (dO Vᵀ + dlse - rowsum(dO ∘ O))``.

    Args:
        tensors: ``(…, D)`` each.
        dlse: as ``dout`` without its last dimension.
        columns: how many columns; the others are 0. The caller cuts them off the gradients.
    """
    dout, q, k, v, out = (torch.nn.functional.pad(x, (0, columns)) for x in tensors)
    dout[..., -columns] = dlse
    v[..., -columns] = 1
    return [dout, q, k, v, out]
