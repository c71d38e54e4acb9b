"""The slice of a batch's sequences that a rank holds, and attention over the group that holds the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from longnet_dist.attention.functional import dilated_attention
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.hf.operator import Edges, edges_of


@dataclass(eq=False)
class SequenceSlice:
    """Hold which tokens of a batch ``(B, N)`` this rank computes.

    All ranks have ``n = ⌈N / P⌉`` tokens. Where ``P`` does not divide ``N``, the last ones are padding, which lies
    outside of all documents.

    Attributes:
        total_rows: ``N``.
        group: the sequence-parallel group; None for one device.
        edges: of the documents, in tokens of the whole sequence: one list, one for each item, or None for one document.
        calls: layers that have attended so far.
    """

    total_rows: int
    group: dist.ProcessGroup | None = None
    edges: Edges = None
    calls: int = 0

    @classmethod
    def of(
        cls,
        total_rows: int,
        group: dist.ProcessGroup | None,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> SequenceSlice:
        """Return this rank's slice of a batch, all of whose tensors are whole.

        Args:
            total_rows: ``N``.
            group: the sequence-parallel group, its rank order the order of the slices; None for one device.
            mask: ``(B, N)``, true for tokens; padding stands before or behind them.
            position_ids: ``(B, N)``; where they do not grow by 1, a packed document begins.
            cu_seqlens: edges of packed documents, ``(documents + 1,)``.

        Raises:
            ShapeError: a mask with gaps, or without a token.
        """
        found = cls(total_rows, group, edges_of(mask, position_ids, cu_seqlens, total_rows, total_rows))
        if found.edges is None and found.rows * found.ranks != total_rows:
            found.edges = [0, total_rows]
        return found

    @property
    def ranks(self) -> int:
        """Return the number of ranks ``P``."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rows(self) -> int:
        """Return the tokens ``n`` of each rank."""
        return -(-self.total_rows // self.ranks)

    @property
    def start(self) -> int:
        """Return this rank's first token; it may be ``N`` or more, where all of the rank is padding."""
        return 0 if self.group is None else dist.get_rank(self.group) * self.rows

    def cut(self, whole: Tensor, fill: int = 0) -> Tensor:
        """Return this rank's part ``(B, n, …)`` of ``whole (B, N, …)``, padded with ``fill``; autograd records it."""
        part = whole[:, self.start : self.start + self.rows]
        missing = self.rows - part.shape[1]
        return F.pad(part, (*(0, 0) * (part.dim() - 2), 0, missing), value=fill) if missing else part

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: DilatedPattern,
        *,
        causal: bool,
        scale: float | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Return dilated attention ``(B, n, H, D)`` over the sequences of the group; all its ranks must call.

        Args:
            q: ``(B, n, H, D)``.
            k, v: ``(B, n, Hkv, D)``.
            pattern: the branches.
            causal: whether a token sees only itself and earlier ones.
            scale: factor of the scores, ``D ** -0.5`` if not given.
            sink: ``(H,)``; its gradient is this rank's part.

        Raises:
            ShapeError, ConfigError: as :func:`~longnet_dist.dilated_attention`, alike on all ranks.
        """
        self.calls += 1
        out = dilated_attention(
            q, k, v, pattern, causal=causal, scale=scale, group=self.group, cu_seqlens=self.edges, sink=sink,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return cast(Tensor, out)
