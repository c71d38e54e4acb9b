"""The attention weights of single rows, to look at: attention itself never holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longnet_dist.attention.sink import check_sink
from longnet_dist.attention.validation import check_inputs, check_scale, check_types, positive_scale
from longnet_dist.errors import ShapeError
from longnet_dist.geometry.documents import Documents, as_integer, read_edges
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import segment_at
from longnet_dist.numerics import wide_dtype


def attention_weights(
    q_rows: Tensor,
    k: Tensor,
    pattern: DilatedPattern,
    rows: Sequence[int] | Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    sink: Tensor | None = None,
    cu_seqlens: Any = None,
) -> Tensor:
    r"""Return the weight of every key for some rows: ``out = weights @ v`` in :func:`~longnet_dist.dilated_attention`.

    .. math::
        P_{ij} = c_{ij} e^{s_{ij}} \Big/ \Big(\sum_j c_{ij} e^{s_{ij}} + e^{\sigma_i}\Big)

    for a key that row :math:`i` sees in :math:`c_{ij}` branches. It is exact, and costs ``O(N)`` for each row and head.

    Args:
        q_rows: queries ``(B, len(rows), H, D)`` of these rows.
        k: keys ``(B, N, Hkv, D)`` of the whole sequence, ``H`` a multiple of ``Hkv``; same dtype and device.
        pattern: the branches.
        rows: the rows, integers in ``[0, N)``, in any order.
        causal: whether a row sees only itself and earlier rows.
        scale: factor of the scores, ``D ** -0.5`` if not given.
        sink: ``(H,)``, ``(len(rows), H)`` or ``(B, len(rows), H)``, as in ``dilated_attention``.
        cu_seqlens: edges of packed documents in rows of the sequence, as in ``dilated_attention``.

    Returns:
        weights ``(B, len(rows), H, N)``, float32 (float64 for float64 inputs), differentiable. They add up to 1, less
        the weight of the sink; to 0 in padding and where no branch covers a (row, head).

    Raises:
        ShapeError: shapes, dtypes, devices, rows or edges that do not fit.
        ConfigError: a scale that is no finite number.
    """
    check_types(q_rows, k, k, pattern, causal, None, None, sink)
    if k.dim() == 4 and q_rows.dim() == 4 and q_rows.numel() and q_rows.shape[1] > k.shape[1]:
        check_inputs(q_rows[:, :1], k, k, short=True)  # rows may be given more than once
    else:
        check_inputs(q_rows, k, k, short=True)
    check_sink(sink, q_rows)
    q_rows, scale = positive_scale(q_rows, scale)
    check_scale(scale)
    batch, total, kv_heads, dim = k.shape
    numbers = _checked_rows(rows, q_rows.shape[1], total)
    lists: list[Documents | None] = [None]
    if cu_seqlens is not None:
        lists = [Documents.of_edges(edges) for edges in read_edges(cu_seqlens, batch, total)]
    # c_ij, one for all items or one for each.
    counts = torch.stack([_counts(pattern, numbers, total, kv_heads, causal, documents) for documents in lists])
    wide = wide_dtype(k.dtype)
    q = torch.unflatten(q_rows.to(wide), 2, (kv_heads, -1))
    scores = torch.einsum("bmhgd,bnhd->bmhgn", q, k.to(wide)) * (dim**-0.5 if scale is None else scale)
    # c·exp(s) = exp(s + ln c), and ln 0 = -inf hides a key that no branch holds.
    scores = (scores + counts.to(k.device, wide).log()[:, :, :, None]).flatten(2, 3)
    lse = scores.masked_fill(scores == -torch.inf, torch.finfo(wide).min).logsumexp(-1)
    visible = (scores > -torch.inf).any(-1)
    if sink is not None:
        lse = torch.where(visible, torch.logaddexp(lse, sink.to(wide)), 0.0)
    return (scores - lse[..., None]).exp().masked_fill(~visible[..., None], 0.0)


def _checked_rows(rows: Sequence[int] | Tensor, queries: int, total: int) -> list[int]:
    values = rows.tolist() if hasattr(rows, "tolist") else rows
    values = list(values) if hasattr(values, "__iter__") else [values]
    numbers = [number for number in map(as_integer, values) if number is not None and 0 <= number < total]
    if len(numbers) != len(values) or len(values) != queries:
        raise ShapeError(
            f"rows must be as many integers as q_rows has rows, {queries}, each at least 0 and below the {total} rows "
            f"of k, but are {values[:6]}{' …' if len(values) > 6 else ''}, {len(values)} in all"
        )
    return numbers


def _counts(
    pattern: DilatedPattern, rows: list[int], total: int, kv_heads: int, causal: bool, documents: Documents | None
) -> Tensor:
    """Count the branches in which each of ``rows`` sees key ``j``: integers ``(rows, Hkv, N)``."""
    counts = torch.zeros(len(rows), kv_heads, total, dtype=torch.int64)
    for number, branch in enumerate(pattern):
        offsets = pattern.offsets(branch, kv_heads)
        for place, row in enumerate(rows):
            segment = segment_at(pattern, number, row, total, documents)
            if segment is None:  # padding
                continue
            stop = row + 1 if causal else segment.stop
            for head, offset in enumerate(offsets):
                if (row - segment.start) % branch.dilation_rate == offset:
                    counts[place, head, segment.start + offset : stop : branch.dilation_rate] += 1
    return counts
