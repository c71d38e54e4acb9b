"""Torchscale's zero keys as the sink of a call, for checkpoints that were trained with them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longnet_dist.attention.sink import phantom_keys
from longnet_dist.geometry.documents import Documents
from longnet_dist.geometry.pattern import DilatedPattern


@dataclass(eq=False)
class PhantomKeys:
    """Give the rows of a call their phantom keys; the layers of a model share one object and its cache.

    Attributes:
        heads: query heads ``H``.
        kv_heads: key/value heads.
    """

    heads: int
    kv_heads: int
    _cached: tuple[tuple[object, ...], Tensor] | None = field(default=None, init=False, repr=False)

    def sink(
        self,
        pattern: DilatedPattern,
        window: tuple[int, int],
        total_rows: int,
        documents: Documents | None,
        device: torch.device,
    ) -> Tensor:
        """Return the sink ``(n, H)`` of rows ``window``, float32; every document has those that it has alone.

        Args:
            pattern: the branches.
            window: first global row of the call, and the row behind the last.
            total_rows: ``N``.
            documents: of the sequence; None: it is one document.
            device: where the sink is needed.
        """
        key = (pattern, window, total_rows, documents, device)
        if self._cached is None or self._cached[0] != key:
            documents = documents or Documents((0,), (total_rows,))
            warn_of_misplaced_rows(pattern, documents.longest)
            with torch.inference_mode(False):  # the sink of an evaluation may serve a training step
                self._cached = key, self._of(pattern, window, documents).to(device)
        return self._cached[1]

    def _of(self, pattern: DilatedPattern, window: tuple[int, int], documents: Documents) -> Tensor:
        start, stop = window
        sink = torch.full((stop - start, self.heads), -torch.inf)
        for first, last in zip(documents.starts, documents.stops, strict=True):
            here, there = max(first, start), min(last, stop)
            if here < there:
                alone = phantom_keys(pattern, last - first, self.heads, self.kv_heads)
                sink[here - start : there - start] = alone[here - first : there - first]
        return sink


def warn_of_misplaced_rows(pattern: DilatedPattern, rows: int) -> None:
    """Warn if torchscale gives rows of a sequence of ``rows`` rows the answers of other rows.

    It fills each segment up to a multiple of ``r`` and lays the answers end to end with that fill. So from the second
    segment on they are shifted.
    """
    for branch in pattern:
        w, r = branch.segment_length, branch.dilation_rate
        if w % r and rows > w:
            warnings.warn(
                f"torchscale misplaces rows where r does not divide w and there are several segments, here w={w}, "
                f"r={r} and {rows} rows; this model places them right, so rows behind the first {w} differ from "
                f"torchscale's",
                stacklevel=2,
            )
